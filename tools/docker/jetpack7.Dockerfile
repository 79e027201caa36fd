# gap-export serve on a Jetson with JetPack 7.2: its TensorRT builds the engines at the first
# start, on the Jetson. On it, from the repository's root:
#   docker build -f tools/docker/jetpack7.Dockerfile -t gap-export:jetpack7 .
#   docker run --runtime nvidia --group-add video -p 8000:8000 \
#       -v "$PWD/llava-orin:/bundle:ro" -v gap-export:/cache gap-export:jetpack7
# The base image must bring TensorRT 10.16 to 11.4 with its Python package, for Python 3.12.
ARG BASE=nvcr.io/nvidia/tensorrt:26.06-py3
FROM python:3.12-slim-bookworm AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM ${BASE}
# The environment sees the base image's own tensorrt.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv --system-site-packages /opt/gap
ENV PATH=/opt/gap/bin:$PATH
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile "$(ls /wheels/*.whl)[serve]" "cuda-python==13.*" \
    && useradd --uid 10001 --create-home gap \
    && install --directory --owner=gap /cache
COPY tools/docker/start.py /usr/local/bin/start.py
USER 10001
ENV XDG_CACHE_HOME=/cache GAP_EXPORT_BACKEND=trt
VOLUME /cache
EXPOSE 8000
# Engines of a 7B model are built for an hour on a small board.
HEALTHCHECK --start-period=120m --interval=10s --timeout=5s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python3", "/usr/local/bin/start.py"]
