"""Generated protobuf and gRPC stubs of package easyspec.v1; made by `make protos`."""
