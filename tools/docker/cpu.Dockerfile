# gap-export serve on a CPU, x86-64 or aarch64. From the repository's root:
#   docker build -f tools/docker/cpu.Dockerfile -t gap-export:cpu .
#   docker run -p 8000:8000 -v "$PWD/bundle:/bundle:ro" -v gap-export:/cache gap-export:cpu
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS wheel
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM ${BASE}
# Nothing is compiled; the wheel is not in a layer of its own.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-compile "$(ls /wheels/*.whl)[serve]" \
    && useradd --uid 10001 --create-home gap \
    && install --directory --owner=gap /cache
COPY tools/docker/start.py /usr/local/bin/start.py
USER 10001
ENV XDG_CACHE_HOME=/cache GAP_EXPORT_BACKEND=ort
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=2m --interval=10s --timeout=5s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["python3", "/usr/local/bin/start.py"]
