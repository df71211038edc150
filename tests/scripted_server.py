"""A server of REST that sends what a test tells it to, and a good answer to begin with."""

import contextlib
import json
import socketserver
import threading

D = 5  # rows of each image in `good`


def good(images=2):
    """The outputs of an answer, as JSON has them: three detections an image."""
    rows = {"boxes": [1.5, 2, 30, 20.25], "scores": 0.5, "labels": 1, "category_ids": 2**40 + 1, "names": "größe"}
    empty = {"boxes": [0, 0, 0, 0], "scores": 0, "labels": -1, "category_ids": -1, "names": ""}
    found = {name: [[rows[name]] * 3 + [empty[name]] * (D - 3) for _ in range(images)] for name in rows}
    return {**found, "num_detections": [3] * images}


def http(body, status="200 OK", headers=""):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def answer(**others):
    """An answer to one image, with other outputs in place of the good ones."""
    return http(json.dumps({"outputs": {**good(1), **others}}).encode())


class Rest(socketserver.StreamRequestHandler):
    """Answers each request with the next bytes of `replies`, and closes."""

    def handle(self):
        length = 0
        while (line := self.rfile.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0])


@contextlib.contextmanager
def serving():
    """A server of REST at `address` that sends its `replies` one after the other, and the last again."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Rest) as server:
        server.daemon_threads = True
        server.address, server.replies = f"http://127.0.0.1:{server.server_address[1]}", []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
