"""Bytes and messages to values and back: protobuf, CloudEvents, errors. No I/O."""
