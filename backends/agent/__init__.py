"""What runs on the device: it probes, builds, runs and measures there, and talks to edgec over stdin and stdout.

The folder is packed into one file, edgec-device.pyz (backends/targets/packing.py), that any `python3` runs: standard
library only, and nothing newer than Python 3.6, which is what JetPack 4 has (tests/test_agent_syntax.py sees to both).
So types are written as typing.List, records are NamedTuples, and no module here imports from outside this folder.

    main            the command line: serve (the session; folders, jobs), work, alone (a carried bundle)
    frames, faults, tensors    messages over a pipe; what goes wrong, in words; names, types, shapes, bytes
    worker, lock    one job, in a process of its own that may crash; one run at a time on a device
    measuring       rounds over what is opened; opened: what runtimes have in common
    onnx_runtime, tvm_module    two of them
    engines         the third: TensorRT's, built and kept for a session
      tensorrt_rules           which version wants what
      tensorrt_build (log, progress, identity), tensorrt_engine (tensors, profile)    by its Python module
      trtexec (run, engine, output, faults), onnx_file                                by its program
      layer_info, cudart       kernels joined to ONNX nodes; CUDA by ctypes
    probe           what the device is: gpus, software, reading
    power           its watts; clocks, throttling, nvml
"""
