# /// script
# dependencies = ["aimet-onnx==2.42.0", "onnxruntime==1.31.1", "torch==2.13.0", "torchvision==0.28.0"]
#
# [tool.peers]
# configs = ["minmax", "minmax cle"]
# ///
