"""Folders that stand for devices: what /proc, /sys, /etc and /usr of boards hold, written by hand from what NVIDIA,
Raspberry Pi and jetson_stats document for them; and programs that answer as theirs do."""

import os

_ARM = """processor\t: {n}
BogoMIPS\t: 62.50
Features\t: {features}
CPU implementer\t: 0x41
CPU part\t: {part}
"""
_ARMV8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT = _ARMV8 + " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"


def _cpuinfo(cores, features, part, last=""):
    return "\n".join(_ARM.format(n=n, features=features, part=part) for n in range(cores)) + last


def _meminfo(total_kb, free_kb):
    return f"MemTotal:       {total_kb} kB\nMemFree:         100 kB\nMemAvailable:   {free_kb} kB\n"


def _tree(model, *compatible):
    return {
        "/proc/device-tree/model": model + "\0",
        "/proc/device-tree/compatible": "".join(one + "\0" for one in compatible),
    }


def _devfreq(name, current, low, high, load=None):
    files = {"cur_freq": current, "min_freq": low, "max_freq": high}
    found = {f"/sys/class/devfreq/{name}/{file}": value for file, value in files.items()}
    if load is not None:
        found[f"/sys/class/devfreq/{name}/device/load"] = load
    return found


def _cpufreq(cores, current, low, high, governor="schedutil"):
    files = {"cur_freq": current, "min_freq": low, "max_freq": high, "governor": governor}
    return {
        f"/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_{file}": value for n in cores for file, value in files.items()
    }


def _zones(**degrees):
    found = {}
    for n, (name, value) in enumerate(degrees.items()):
        folder = f"/sys/class/thermal/thermal_zone{n}"
        found |= {f"{folder}/type": name.replace("_", "-"), f"{folder}/temp": value}
    return found


def _ina3221(hwmon, *rails):
    folder = f"/sys/class/hwmon/hwmon{hwmon}"
    found = {f"{folder}/name": "ina3221", f"{folder}/in7_label": "sum of shunt voltages"}
    for n, (label, millivolts, milliamperes) in enumerate(rails, start=1):
        found |= {
            f"{folder}/in{n}_label": label,
            f"{folder}/in{n}_input": millivolts,
            f"{folder}/curr{n}_input": milliamperes,
        }
    return found


def _over_current(*counts):
    found = {"/sys/class/hwmon/hwmon9/name": "soctherm_oc"}
    for n, count in enumerate(counts, start=1):
        found[f"/sys/class/hwmon/hwmon9/oc{n}_event_cnt"] = count
        found[f"/sys/class/hwmon/hwmon9/oc{n}_throt_en"] = 1
    return found


NANO = {
    **_tree(
        "NVIDIA Jetson Nano Developer Kit",
        "nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210",
    ),
    "/etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 29818004, BOARD: t210ref, EABI: aarch64, DATE: x\n",
    "/proc/cpuinfo": _cpuinfo(4, _ARMV8, "0xd07"),
    "/proc/meminfo": _meminfo(4059252, 2500000),
    "/proc/loadavg": "0.42 0.20 0.10 1/300 4321\n",
    "/usr/local/cuda/version.txt": "CUDA Version 10.2.300\n",
    "/usr/lib/aarch64-linux-gnu/libnvinfer.so.8": "",
    "/usr/lib/aarch64-linux-gnu/libnvinfer.so.8.2.1": "",
    **_devfreq("57000000.gpu", 921600000, 76800000, 921600000, 250),
    **_cpufreq(range(4), 1479000, 102000, 1479000),
    **_zones(CPU_therm=41500, GPU_therm=40000, PMIC_Die=100000),
    "/sys/class/thermal/cooling_device0/type": "pwm-fan",
    "/sys/class/thermal/cooling_device0/cur_state": 3,
    "/sys/class/thermal/cooling_device1/type": "CPU-balanced",
    "/sys/class/thermal/cooling_device1/cur_state": 0,
    **{
        f"/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/{file}": value
        for n, (rail, milliwatts) in enumerate((("POM_5V_IN", 5100), ("POM_5V_GPU", 1200), ("POM_5V_CPU", 900)))
        for file, value in ((f"rail_name_{n}", rail), (f"in_power{n}_input", milliwatts))
    },
}  # fmt: skip

XAVIER_NX = {
    **_tree(
        "NVIDIA Jetson Xavier NX Developer Kit",
        "nvidia,p3449-0000+p3668-0000", "nvidia,jetson-xavier-nx", "nvidia,tegra194",
    ),
    "/etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64, DATE: x\n",
    "/proc/cpuinfo": _cpuinfo(6, _DOT, "0x004"),
    "/proc/meminfo": _meminfo(7008000, 5000000),
    "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "11.4.19"}}',
    "/var/lib/dpkg/status": (
        "Package: libnvinfer-dev\nStatus: install ok installed\nVersion: 8.5.2-1+cuda11.4\n\n"
        "Package: libnvinfer8\nStatus: install ok installed\nArchitecture: arm64\nVersion: 8.5.2-1+cuda11.4\n"
    ),
    "/var/lib/nvpmodel/status": "pmode:0008 fmode:fanNull\n",
    "/etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MODE_15W_2CORE >\n< POWER_MODEL ID=8 NAME=MODE_20W_6CORE >\n",
    **_devfreq("17000000.gv11b", 1109250000, 114750000, 1109250000),
    **_cpufreq(range(6), 1190400, 1190400, 1907200),
    **_zones(CPU_therm=38000),
    **_ina3221(3, ("VDD_IN", 5000, 1000), ("VDD_CPU_GPU_CV", 5000, 300), ("VDD_SOC", 5000, 200)),
}  # fmt: skip

ORIN_NANO = {
    **_tree(
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234",
    ),
    "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: x\n",
    "/proc/cpuinfo": _cpuinfo(6, _DOT, "0xd42"),
    "/proc/meminfo": _meminfo(7802000, 6100000),
    "/proc/loadavg": "0.10 0.12 0.09 1/400 999\n",
    "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "/usr/include/aarch64-linux-gnu/NvInferVersion.h": (
        "#define NV_TENSORRT_MAJOR 10 //!< x\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n"
    ),
    **_devfreq("17000000.gpu", 1020000000, 1020000000, 1020000000, 0),
    **_cpufreq(range(6), 1728000, 1728000, 1728000, "performance"),
    **_zones(cpu_thermal=48500, gpu_thermal=49000, cv0_thermal="", tj_thermal=49000),
    "/sys/class/thermal/thermal_zone0/trip_point_0_type": "critical",
    "/sys/class/thermal/thermal_zone0/trip_point_0_temp": 104500,
    "/sys/class/thermal/thermal_zone0/trip_point_1_type": "passive",
    "/sys/class/thermal/thermal_zone0/trip_point_1_temp": 99000,
    "/sys/class/thermal/cooling_device0/type": "cpu-throttle-alert",
    "/sys/class/thermal/cooling_device0/cur_state": 0,
    **_over_current(0, 2, 5),
    **_ina3221(3, ("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 300)),
}  # fmt: skip

ORIN_NX = {
    **ORIN_NANO,
    **_tree(
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234",
    ),
    "/proc/meminfo": _meminfo(16000000, 14000000),
}  # fmt: skip

AGX_ORIN = {
    **ORIN_NANO,
    **_tree(
        "NVIDIA Jetson AGX Orin Developer Kit",
        "nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234",
    ),
    "/etc/nv_tegra_release": "# R35 (release), REVISION: 3.1, GCID: 32827747, BOARD: t186ref, EABI: aarch64, DATE: x\n",
    "/proc/meminfo": _meminfo(64300000, 60000000),
    **_ina3221(3, ("VDD_GPU_SOC", 10000, 400), ("VDD_CPU_CV", 10000, 100), ("VIN_SYS_5V0", 5000, 1000)),
    **_ina3221(4, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 100), ("NC", 0, 0)),
}  # fmt: skip

THOR = {
    **_tree(
        "NVIDIA Jetson AGX Thor Developer Kit",
        "nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264",
    ),
    "/etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: x\n",
    "/proc/cpuinfo": _cpuinfo(14, _DOT + " sve i8mm", "0xd83"),
    "/proc/meminfo": _meminfo(128800000, 120000000),
    "/usr/include/aarch64-linux-gnu/NvInferVersion.h": (
        "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 13\n#define TRT_PATCH_ENTERPRISE 3\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n"
        "#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE\n"
    ),
    **_devfreq("gpu-gpc-0", 1575000000, 315000000, 1575000000),
    **_devfreq("gpu-nvd-0", 1692000000, 567000000, 1692000000),
    **_devfreq("bwmgr", 4266000000, 665600000, 4266000000),
    **_ina3221(4, ("VDD_GPU", 12000, 1000), ("VDD_CPU_SOC_MSS", 12000, 500), ("VIN_SYS_5V0", 5000, 1000)),
    "/sys/class/hwmon/hwmon5/name": "ina238",
    "/sys/class/hwmon/hwmon5/in1_label": "VIN",
    "/sys/class/hwmon/hwmon5/power1_input": 41500000,
}  # fmt: skip

PI_4 = {
    **_tree("Raspberry Pi 4 Model B Rev 1.4", "raspberrypi,4-model-b", "brcm,bcm2711"),
    "/proc/cpuinfo": _cpuinfo(
        4, "fp asimd evtstrm crc32 cpuid", "0xd08", "\nRevision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"
    ),
    "/proc/meminfo": _meminfo(3884396, 3000000),
    "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n',
    **_cpufreq(range(4), 600000, 600000, 1800000, "ondemand"),
    **_zones(cpu_thermal=52100),
}  # fmt: skip

PI_5 = {
    **_tree("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712"),
    "/proc/cpuinfo": _cpuinfo(4, _DOT, "0xd0b", "\nRevision\t: d04170\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"),
    "/proc/meminfo": _meminfo(8245600, 7000000),
    **_cpufreq(range(4), 2400000, 1500000, 2400000, "ondemand"),
    **_zones(cpu_thermal=61000),
    "/sys/class/hwmon/hwmon2/name": "rpi_volt",
    "/sys/class/hwmon/hwmon2/in0_lcrit_alarm": 0,
}

DESKTOP = {
    "/proc/cpuinfo": (
        "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i7-12700K\nphysical id\t: 0\ncore id\t\t: 0\n"
        "flags\t\t: fpu sse2 avx avx2 avx_vnni\n\n"
        "processor\t: 1\nmodel name\t: Intel(R) Core(TM) i7-12700K\nphysical id\t: 0\ncore id\t\t: 0\n"
        "flags\t\t: fpu sse2 avx avx2 avx_vnni\n\n"
        "processor\t: 2\nmodel name\t: Intel(R) Core(TM) i7-12700K\nphysical id\t: 0\ncore id\t\t: 4\n"
        "flags\t\t: fpu sse2 avx avx2 avx_vnni\n"
    ),
    "/proc/meminfo": _meminfo(32600000, 20000000),
    "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\nGCC version:\n",
    "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.8.0"}}',
    "/usr/lib/x86_64-linux-gnu/libnvinfer.so.10.13.3": "",
    **_cpufreq((0, 1), 4900000, 800000, 4900000, "powersave"),
    **_cpufreq((2,), 3000000, 800000, 3600000, "powersave"),
    "/sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": 7,
    "/sys/class/hwmon/hwmon1/name": "coretemp",
    "/sys/class/hwmon/hwmon1/temp1_input": 44000,
    "/sys/class/hwmon/hwmon1/temp2_input": 51000,
}

#: nvidia-smi as a script: what it answers is in the files of its folder, by field; a field without one is refused.
_SMI = """#!/bin/sh
here=$(dirname "$0")/nvidia-smi.d
case "$1" in
  --query-gpu=*) fields=${1#--query-gpu=} ;;
  --query-compute-apps=*) cat "$here/apps" ; exit 0 ;;
  *) echo "Invalid combination of input arguments." ; exit 1 ;;
esac
line=""
for field in $(echo "$fields" | tr ',' ' '); do
  if [ ! -f "$here/$field" ]; then
    echo "Field \\"$field\\" is not a valid field to query."
    exit 2
  fi
  value=$(cat "$here/$field")
  if [ -n "$line" ]; then line="$line, $value"; else line="$value"; fi
done
echo "$line"
"""
CARD = {
    "name": "NVIDIA GeForce RTX 4090",
    "driver_version": "570.86.15",
    "memory.total": "24564",
    "compute_cap": "8.9",
    "clocks.current.graphics": "2520",
    "clocks.max.graphics": "3105",
    "clocks.current.memory": "10501",
    "clocks.max.memory": "10501",
    "temperature.gpu": "47",
    "clocks_event_reasons.active": "0x0000000000000001",
}


def plant(folder, files):
    """Write files, {absolute path: content}, under a folder that stands for `/`; return it as text."""
    for path, content in files.items():
        file = folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(content), encoding="utf-8")
    return str(folder)


def program(folder, name, script):
    """Write a program that a shell runs; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(script, encoding="utf-8")
    file.chmod(0o755)
    return file


def only_programs(monkeypatch, folder):
    """Make the PATH that folder and the shell's own tools: whatever this machine has is not seen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sh", "cat", "dirname", "tr", "sleep"):
        if not (folder / name).exists():
            os.symlink(next(p for p in (f"/bin/{name}", f"/usr/bin/{name}") if os.path.exists(p)), folder / name)
    monkeypatch.setenv("PATH", str(folder))


def smi(folder, card, apps=""):
    """Put an nvidia-smi into a folder that knows exactly these fields of one card, and these lines of programs."""
    program(folder, "nvidia-smi", _SMI)
    answers = folder / "nvidia-smi.d"
    answers.mkdir(exist_ok=True)
    for field, value in {**card, "apps": apps}.items():
        (answers / field).write_text(value, encoding="utf-8")
