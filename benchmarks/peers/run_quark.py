# /// script
# dependencies = ["amd-quark==0.13", "onnxruntime==1.31.1", "torch==2.13.0"]
#
# [tool.peers]
# configs = ["INT8_CNN_DEFAULT", "INT8_CNN_ACCURATE", "U8S8_AAWS"]
# ///
