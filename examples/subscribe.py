"""Print the live telemetry of a site: python subscribe.py tcp://HOST:PORT [TOPIC_PREFIX]

The address is the telemetry address that the optimizer prints. Needs pyzmq and msgpack, nothing of ekya.
"""

import sys

import msgpack
import zmq

address, prefix = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
socket = zmq.Context().socket(zmq.SUB)
socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
socket.connect(address)
newest: dict[str, int] = {}
while True:
    topic, counters, payload = socket.recv_multipart()
    publisher = counters[16:].decode()
    # Bytes 0-7 count all events of a publisher, bytes 8-15 those of this topic: a filter needs the second.
    key, start = (publisher + topic.decode(), 8) if prefix else (publisher, 0)
    sequence = int.from_bytes(counters[start : start + 8], "big")
    missed = sequence - newest.get(key, sequence - 1) - 1
    newest[key] = sequence
    print(topic.decode(), f"(missed {missed})" if missed else "", msgpack.unpackb(payload), flush=True)
