# A worker on an NVIDIA card. The base is vLLM's own image of the version that complete-fn builds on (pyproject.toml,
# extra `worker`): its attention backends and checkpoint formats are what SwiftKV's model subclasses.
#   docker build -f deploy/worker-cuda.Dockerfile -t complete-fn-worker-cuda .
FROM vllm/vllm-openai:v0.32.0

WORKDIR /src
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[service,fleet,s3,databases]' \
    && rm -rf /src \
    && useradd --create-home --uid 10001 complete \
    && install -d -o complete -g complete /var/lib/complete-fn

WORKDIR /home/complete
USER 10001
ENV COMPLETE_FN_HOME=/var/lib/complete-fn
STOPSIGNAL SIGTERM
ENTRYPOINT ["complete-fn"]
CMD ["worker", "--internal-host", "0.0.0.0"]
