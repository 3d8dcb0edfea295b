"""The Open Inference Protocol on the coordinator's port: the system's calls as models of tensors.

`open_inference_pb2` is generated from protos/inference (scripts/generate-protos)."""
