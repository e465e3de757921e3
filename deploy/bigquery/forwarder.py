"""What BigQuery calls on Cloud Run: passes requests on to the service with its API key. No libraries.

Environment: COMPLETE_FN_URL, COMPLETE_FN_KEY (from Secret Manager), PORT (Cloud Run sets it). `python forwarder.py`;
request time-out: 20 minutes; let only the connection's service account invoke it.
"""

import os
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATHS = ("/v1/dialects/bigquery/complete", "/v1/dialects/bigquery/complete_details")
PASSED = ("Content-Type", "Retry-After")
SECONDS = 1180


class Forwarder(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path not in PATHS:
            self.answer(400, {"Content-Type": "application/json"}, b'{"errorMessage": "There is nothing here."}')
            return
        headers = {
            "Content-Type": "application/json",
            "Authorization": "Bearer " + os.environ.get("COMPLETE_FN_KEY", ""),  # in place of BigQuery's own token
        }
        url = os.environ["COMPLETE_FN_URL"].rstrip("/") + self.path
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=SECONDS) as reply:
                self.answer(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            self.answer(error.code, error.headers, error.read())
        except OSError:
            self.answer(503, {"Retry-After": "5"}, b'{"errorMessage": "complete-fn does not answer."}')

    def answer(self, status, headers, body):
        self.send_response(status)
        for name in PASSED:
            if headers.get(name):
                self.send_header(name, headers.get(name))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing of a request is logged."""


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Forwarder).serve_forever()
