# haste on GPUs: docker build -t haste . && docker run --gpus all --shm-size 8g -v "$PWD:/data" haste train wordnet
#
# The runtime image has the CUDA libraries but no compiler for CUDA: torch's wheels bring their own kernels, and Triton needs only the
# C compiler and Python's headers below to build its launchers at first use.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ make python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/haste
COPY . .
# The same steps and the same pins as everywhere else. constraints-cpu.txt names torch 2.13.0, which PyPI serves as the CUDA build on
# Linux; that wheel pins its CUDA libraries and Triton itself, so the GPU environment is locked too.
RUN make install VENV=/opt/haste/.venv EXTRAS=gpu,serve PYTHON=python3 \
 && rm -rf /root/.cache

# Nobody needs root to train. Ubuntu 24.04 gives 1000 to its own user, so that user is replaced and files in /data belong to 1000.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 haste && mkdir /data && chown haste:haste /data
USER haste
ENV PATH=/opt/haste/.venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0
WORKDIR /data
ENTRYPOINT ["haste"]
CMD ["--help"]
