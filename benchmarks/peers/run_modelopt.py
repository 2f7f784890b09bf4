# /// script
# dependencies = ["nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0"]
#
# [tool.peers]
# configs = ["int8 max", "int8 entropy"]
# ///
