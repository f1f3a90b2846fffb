"""libp2p's protobuf messages, generated from the .proto files beside them by scripts/protos."""
