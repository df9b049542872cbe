"""Event sidecar: publish and consume events over NATS and JetStream without a broker client."""

__version__ = "0.1.0"
