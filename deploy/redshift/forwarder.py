"""The Lambda function that Redshift calls: passes the event on to the service and gives its reply back. No libraries.

Environment: COMPLETE_FN_URL, COMPLETE_FN_KEY (from Secrets Manager), COMPLETE_FN_FUNCTION (`complete` or
`complete_details`). Handler: `forwarder.forward`; time-out: 15 minutes; in a subnet that reaches the service.
"""

import json
import os
import time
import urllib.error
import urllib.request

SECONDS = 850  # Lambda ends a call after 900
PAUSE = 2


def forward(event, context=None):
    """Redshift's event in, Redshift's reply out. What may pass is tried again; it is never computed twice."""
    until = time.monotonic() + SECONDS
    path = "/v1/dialects/redshift/" + os.environ.get("COMPLETE_FN_FUNCTION", "complete")
    body = json.dumps(event).encode()
    status, reply = ask("POST", path, event, body)
    while time.monotonic() < until:
        if status == 202:
            status, reply = ask("GET", path, event)
        elif status == 0 or status == 429 or status >= 500:
            time.sleep(PAUSE)
            status, reply = ask("POST", path, event, body)
        else:
            break
    if isinstance(reply, dict) and "success" in reply:
        return reply
    return {"success": False, "error_msg": f"complete-fn answers {status or 'nothing'}: {reply}"[:1000]}


def ask(method, path, event, body=None):
    headers = {
        "Content-Type": "application/json",
        "Complete-Batch-Id": str(event.get("request_id")),
        "Authorization": "Bearer " + os.environ.get("COMPLETE_FN_KEY", ""),
    }
    request = urllib.request.Request(os.environ["COMPLETE_FN_URL"].rstrip("/") + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answered:
            return answered.status, json.load(answered)
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        try:
            return error.code, json.loads(text)
        except ValueError:
            return error.code, text
    except OSError as error:
        return 0, str(error)
