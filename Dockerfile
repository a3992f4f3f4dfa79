# haste on GPUs and CPUs: docker build -t haste:0.1.0 . && docker run --gpus all --shm-size 8g -v "$PWD:/data" haste:0.1.0 train wordnet
#
# Torch's wheels bring the CUDA libraries, and the host's driver comes with --gpus, so no CUDA image is needed underneath. Triton builds its
# launchers at first use with the C compiler and Python's headers below.
FROM ubuntu:24.04 AS build

RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
# The same pins as everywhere else: constraints-cpu.txt names torch 2.13.0, which PyPI serves as the CUDA build on Linux; that wheel pins its
# CUDA libraries and Triton itself, so the GPU environment is locked too.
RUN launch/install.sh /opt/haste gpu,serve,jobs

FROM ubuntu:24.04

# wget: KubeRay's probes, and the health check. procps: the health check.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv procps wget \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/haste /opt/haste

# Nobody needs root to train. Ubuntu 24.04 gives 1000 to its own user, so that user is replaced and files in /data belong to 1000.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 haste && mkdir /data && chown haste:haste /data
USER haste
ENV PATH=/opt/haste/bin:$PATH RAY_USAGE_STATS_ENABLED=0 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data

# A server must answer; anything else is well while the command works.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s \
  CMD if pgrep -f 'bin/haste serve' > /dev/null; then wget -q -O /dev/null http://127.0.0.1:8000/health; else haste --version; fi

ENTRYPOINT ["haste"]
CMD ["--help"]
