# /// script
# dependencies = ["olive-ai==0.13.0", "onnxruntime==1.31.1", "torch==2.13.0", "requests"]
#
# [tool.peers]
# configs = ["U8S8 minmax"]
# ///
