# docker build -t nybble .                             CPU
# docker build -t nybble:cuda --build-arg VARIANT=cuda .
# TORCH_INDEX: a package index with CPU builds of torch; without one the CPU image carries the CUDA build's libraries.
ARG PYTHON=3.12
ARG VARIANT=cpu

FROM python:${PYTHON}-slim AS build
ARG VARIANT
ARG TORCH_INDEX=""
ENV PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml ./
COPY scripts/bootstrap.py scripts/
RUN NYBBLE_TORCH=${VARIANT} TORCH_INDEX=${TORCH_INDEX} python scripts/bootstrap.py --venv /opt/nybble --image
COPY . .
RUN /opt/nybble/bin/pip install --no-deps .

FROM python:${PYTHON}-slim AS cpu
# OpenMP, which torch's CPU kernels link.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

FROM cpu AS cuda
# Triton compiles its launcher with a C compiler; Python.h is in the base image.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${VARIANT} AS final
RUN useradd --system --uid 10001 --user-group --no-create-home nybble \
    && install -d -o nybble -g nybble /var/cache/nybble
COPY --from=build /opt/nybble /opt/nybble
# Everything that is written at run time lies under the one volume, so the root may be read-only.
ENV PATH=/opt/nybble/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/nybble \
    HF_HOME=/var/cache/nybble/huggingface \
    TRITON_CACHE_DIR=/var/cache/nybble/triton \
    NUMBA_CACHE_DIR=/var/cache/nybble/numba \
    NYBBLE_HOST=0.0.0.0
VOLUME /var/cache/nybble
USER 10001:10001
WORKDIR /var/cache/nybble
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('NYBBLE_PORT', '8000') + '/health', timeout=4)"]
# Exec form: the gateway is process 1 and gets SIGTERM.
ENTRYPOINT ["nybble"]
CMD ["serve"]
