# gap-export serve on a desktop GPU: TensorRT for RTX builds its engines at the first start, and ONNX
# Runtime's CUDA provider serves where it has none for the card. From the repository's root:
#   docker build -f tools/docker/cuda.Dockerfile -t gap-export:cuda .
#   docker run --gpus all -p 8000:8000 -v "$PWD/bundle:/bundle:ro" -v gap-export:/cache gap-export:cuda
ARG BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
FROM python:3.12-slim-bookworm AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/gap
ENV PATH=/opt/gap/bin:$PATH
# onnxruntime-gpu takes the place of onnxruntime: the two overwrite each other's files.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile "$(ls /wheels/*.whl)[serve,trt-rtx,bench]" \
    && pip uninstall --yes onnxruntime \
    && pip install --no-cache-dir --no-compile "onnxruntime-gpu>=1.28" \
    && useradd --uid 10001 --create-home gap \
    && install --directory --owner=gap /cache
COPY tools/docker/start.py /usr/local/bin/start.py
USER 10001
ENV XDG_CACHE_HOME=/cache
VOLUME /cache
EXPOSE 8000
# Engines of a 7B model are built for minutes at the first start.
HEALTHCHECK --start-period=60m --interval=10s --timeout=5s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python3", "/usr/local/bin/start.py"]
