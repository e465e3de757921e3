# A worker on vLLM's CPU build, for machines without a card. Build from the repository's root:
#   docker build -f deploy/worker-cpu.Dockerfile -t complete-fn-worker-cpu .
FROM python:3.11-slim-bookworm

# tcmalloc: the engine takes it where the system has it. libnuma, libgomp: vLLM's CPU kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libtcmalloc-minimal4 libnuma1 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# setup-engine installs the locked list that is inside the package; torch comes from the CPU index where one is given.
ARG PIP_EXTRA_INDEX_URL=""
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[service,fleet,s3,databases]' \
    && complete-fn setup-engine \
    && rm -rf /src /root/.cache \
    && useradd --create-home --uid 10001 complete \
    && install -d -o complete -g complete /var/lib/complete-fn

WORKDIR /home/complete
USER 10001
ENV COMPLETE_FN_HOME=/var/lib/complete-fn
STOPSIGNAL SIGTERM
ENTRYPOINT ["complete-fn"]
CMD ["worker", "--internal-host", "0.0.0.0"]
