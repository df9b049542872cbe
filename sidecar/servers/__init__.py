"""How apps and operators reach the sidecar: gRPC, HTTP, the admin port."""
