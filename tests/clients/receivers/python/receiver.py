"""
An app that is pushed to, with nothing but the CloudEvents SDK: it knows no sidecar.

It prints each event as a line of JSON, and fails the one of --fail the first time it comes.
"""

import argparse
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cloudevents.core.bindings.http import HTTPMessage, from_http_event

arguments = argparse.ArgumentParser()
arguments.add_argument("--listen", default="127.0.0.1:8080")
arguments.add_argument("--fail", default="")
options = arguments.parse_args()
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers["content-length"]))
        event = from_http_event(HTTPMessage(headers, body))
        if take(event, headers):
            self.send_response(204)
        else:
            self.send_response(500)
            self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def take(event, headers):
    with lock:
        failed = event.get_id() == options.fail
        shown = {
            "id": event.get_id(),
            "source": event.get_source(),
            "type": event.get_type(),
            "time": event.get_time().isoformat(),
            "subject": event.get_subject(),
            "datacontenttype": event.get_datacontenttype(),
            "data": base64.b64encode(bytes_of(event.get_data())).decode(),
            "extensions": {
                name: value for name, value in event.get_attributes().items() if name not in CORE
            },
            "failed": failed,
            "headers": headers,
        }
        print(json.dumps(shown), flush=True)
        if failed:
            options.fail = ""
        return not failed


CORE = {"specversion", "id", "source", "type", "time", "subject", "datacontenttype", "dataschema"}


def bytes_of(data):
    if isinstance(data, dict):  # the SDK has parsed JSON
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    return data.encode() if isinstance(data, str) else bytes(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 128


host, _, port = options.listen.rpartition(":")
server = Server((host, int(port)), Handler)
print(json.dumps({"listening": "%s:%d" % server.server_address}), flush=True)
server.serve_forever()
