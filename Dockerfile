# The dependencies of dist_lm on CUDA; the code itself is mounted, or installed as the last line shows.
#   docker build -t dist_lm .
#   docker run --gpus all --ipc=host -v "$PWD:/work" -w /work dist_lm dist-lm launch --config gpt2-124m --data.input corpus/
# This file was not built where it was written, because no registry could be reached from there.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev git iproute2 libaio-dev && \
    rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/dist_lm/bin:$PATH
COPY . /tmp/dist_lm
RUN python3 -m venv /opt/dist_lm && \
    pip install --no-cache-dir "/tmp/dist_lm[deepspeed,s3]" && \
    rm -rf /tmp/dist_lm
