# docker build -t dylora-serve .                                         the CPU image
# docker build -t dylora-serve --build-arg DEVICE=cuda .                 for NVIDIA GPUs: `docker run --gpus all ...`
# docker build ... --secret id=pip_conf,src=pip.conf --secret id=ca_bundle,src=ca.pem .
#                                                                        pip's settings and CA certificates, kept out of layers

# Any image with Python 3.11 and its venv module. Both stages use it, so that the virtual environment fits the second.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS build
# cpu, or cuda: torch with the CUDA libraries it brings, several GB. The base image needs none of its own.
ARG DEVICE=cpu
# Where all packages come from, if not from PyPI. It stays in the image's history: credentials belong in the secret.
ARG PIP_INDEX_URL
# Torch's CPU build comes from there too if that has it, else from where uv knows that it is.
ARG UV=uv==0.13.9
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_CONSTRAINT=/src/constraints.txt
SHELL ["/bin/sh", "-euc"]
WORKDIR /src

# Dependencies first: a change of our own source leaves this layer, which takes minutes, as it is.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    python3 -m venv /opt/dylora; \
    torch=$(grep '^torch==' constraints.txt); \
    case "$DEVICE" in \
        cpu) /opt/dylora/bin/pip install --no-deps "$torch+cpu" || { \
            python3 -m venv /tmp/uv; /tmp/uv/bin/pip install "$UV"; \
            /tmp/uv/bin/uv pip install --no-cache --python /opt/dylora/bin/python --torch-backend=cpu --no-deps "$torch"; \
            rm -rf /tmp/uv; } ;; \
        cuda) /opt/dylora/bin/pip install "$torch,!=${torch#torch==}+cpu" ;; \
        *) echo "DEVICE: '$DEVICE' is not legal: cpu or cuda" >&2; exit 1 ;; \
    esac; \
    python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["tracing"], sep="\n")' >/tmp/requirements.txt; \
    /opt/dylora/bin/pip install -r /tmp/requirements.txt

COPY README.md LICENSE ./
COPY adapters adapters
COPY service service
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca_bundle,target=/run/secrets/ca_bundle \
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \
    /opt/dylora/bin/pip install --no-deps .; \
    /opt/dylora/bin/pip check; \
    /opt/dylora/bin/pip uninstall --yes pip

# The kernels, for processors with AVX2 and with AVX-512. No compiler of this stage gets into the image.
WORKDIR /opt/dylora
# hadolint ignore=DL3008
RUN if ! command -v cc >/dev/null; then \
        apt-get update; \
        apt-get install -y --no-install-recommends gcc libc6-dev; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    bin/python -m service.engine.native.prebuilt

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
# true adds the compilers that torch.compile needs. A GPU's image always has them, for Triton.
ARG COMPILER=false
ARG DEVICE=cpu
SHELL ["/bin/sh", "-euc"]
# The base image's release pins the versions, and updates of it are wanted.
# hadolint ignore=DL3008
RUN if [ "$COMPILER" = true ] || [ "$DEVICE" = cuda ]; then \
        apt-get update; \
        headers=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
        if [ -e "$headers/Python.h" ]; then headers=; else headers=python3-dev; fi; \
        apt-get install -y --no-install-recommends g++ $headers; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    install -d -o 10001 -g 10001 /data

COPY --from=build /opt/dylora /opt/dylora

# All that is written goes to /data: the root file system may be read-only, and /tmp mounted noexec. The demo is open to
# whoever reaches it; any other model is served with keys only (service/README.md).
ENV PATH=/opt/dylora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=dylora \
    HOME=/data \
    XDG_DATA_HOME=/data \
    HF_HOME=/data/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/data/torchinductor \
    TRITON_CACHE_DIR=/data/triton \
    DYLORA_HOST=0.0.0.0 \
    DYLORA_ALLOW_OPEN_DEMO=true

LABEL org.opencontainers.image.title="dylora-serve" \
      org.opencontainers.image.description="LLM inference where the LoRA rank is a run-time choice" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-4.0"

WORKDIR /data
VOLUME /data
EXPOSE 8000
# By number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ.get('DYLORA_PORT', '8000')}/ready\", timeout=4)"]
ENTRYPOINT ["dylora", "serve"]
