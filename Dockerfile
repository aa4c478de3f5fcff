# charkha for machines with an NVIDIA GPU and Docker. Every line stands for a step of `make setup`.
# Not covered by a test run: the project's own tests read this file but build no image.
#
#   docker build -t charkha .
#   docker run --rm --gpus all --network none --ipc host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" \
#       --user "$(id -u):$(id -g)" charkha train charkha.yaml
#
# The image starts offline. To fetch a base model: docker run ... -e HF_HUB_OFFLINE=0 -e HF_TOKEN charkha fetch MODEL
# The host needs an NVIDIA driver of series 580 or newer (CUDA 13) and the NVIDIA Container Toolkit.
FROM nvidia/cuda:13.0.1-base-ubuntu22.04

# gcc and the headers are for the GPU kernels that Triton compiles at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common gpg-agent \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-venv python3.11-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN python3.11 -m venv /opt/charkha
ENV PATH=/opt/charkha/bin:$PATH

WORKDIR /opt/source
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock
COPY tools/install_torch.py tools/
# No GPU is visible while an image is built.
RUN CHARKHA_TORCH=cuda PIP_NO_CACHE_DIR=1 python tools/install_torch.py
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
# The image's user cannot write bytecode later. A few packages ship files of other Pythons, which do not compile.
RUN python -m compileall -qq -j 0 /opt/charkha/lib || true

RUN useradd --create-home --uid 1000 charkha && mkdir -p /work /cache && chmod 1777 /work /cache
USER charkha
# HOME and the caches are writable for any --user.
ENV HOME=/tmp \
    HF_HOME=/cache \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1
WORKDIR /work
ENTRYPOINT ["charkha"]
