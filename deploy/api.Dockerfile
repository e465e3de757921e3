# complete-fn's API: no torch, no vLLM. Build from the repository's root:
#   docker build -f deploy/api.Dockerfile -t complete-fn-api .
FROM python:3.11-slim-bookworm

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
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["complete-fn"]
CMD ["serve", "--host", "0.0.0.0", "--workers", "0"]
