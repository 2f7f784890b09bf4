"""What runs on the device: it probes, builds, runs and measures there, and talks to edgec over stdin and stdout.

The folder is packed into one file, edgec-device.pyz (backends/targets/packing.py), that any `python3` runs: standard
library only, and nothing newer than Python 3.6, which is what JetPack 4 has (tests/test_agent_syntax.py sees to both).
So types are written as typing.List, records are NamedTuples, and no module here imports from outside this folder.

    frames      messages over a pipe         serve     the session: files, jobs, connections that break
    faults      what goes wrong, in words    worker    one job, in a process of its own that may crash
    tensors     names, types, shapes, bytes  measuring rounds over what is opened
    opened      what runtimes have in common: onnx_runtime, tvm_module, tensorrt_engine, trtexec
    probe       what the device is           power     its clocks, temperatures and watts
    cudart      CUDA by ctypes               tensorrt_rules, tensorrt_build: what each version wants
"""
