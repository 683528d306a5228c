# Runs `make a100` in a container. The host needs an A100, driver 580 or later, and NVIDIA's container toolkit.
#   docker build -t nbp-a100 .
#   docker run --rm --gpus all -v "$PWD/nbp-a100:/nbp/nbp-a100" nbp-a100
# This writes nbp-a100/records.jsonl, the file to send back. If pip does not find TensorRT's libraries, which are in
# NVIDIA's own package index, build with --build-arg TENSORRT_INDEX=<its address>.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
ARG TENSORRT_INDEX=
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/nbp
WORKDIR /nbp
COPY LICENSE Makefile README.md constraints.txt pyproject.toml ./
COPY nbp_export nbp_export
COPY reference reference
COPY engines engines
COPY bench bench
COPY reports/nbp_reports reports/nbp_reports
COPY tests/golden tests/golden
RUN /opt/nbp/bin/pip install --no-cache-dir ${TENSORRT_INDEX:+--extra-index-url "$TENSORRT_INDEX"} \
    -c constraints.txt -e '.[cpu,export,trt]'
ENTRYPOINT ["make", "a100", "GPU_PYTHON=/opt/nbp/bin/python"]
