"""From ONNX to Relax as it shall run: passes over Relax, each in a file, in the order of network.py."""
