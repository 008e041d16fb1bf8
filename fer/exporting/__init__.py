"""A trained network for use elsewhere: ONNX, int8, safetensors with a model card."""
