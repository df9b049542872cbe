"""
An app that dies: `python fragile_app.py SOCKET SUBSCRIPTION`.

It acks what it gets, says so in a line "ID ATTEMPT" each, and ends at once, without a word, when
an event's data is "poison".
"""

from __future__ import annotations

import os
import sys

import grpc

from sidecar.v1 import pubsub_pb2 as pb


def main(socket: str, subscription: str) -> None:
    channel = grpc.insecure_channel(f"unix:{socket}")
    call = channel.stream_stream(
        "/sidecar.v1.PubSub/Subscribe",
        request_serializer=pb.SubscribeRequest.SerializeToString,
        response_deserializer=pb.SubscribeResponse.FromString,
    )
    said = iter([pb.SubscribeRequest(open=pb.SubscribeOpen(subscription=subscription), credit=20)])
    answers: list[pb.SubscribeRequest] = []

    def requests() -> object:
        yield from said
        while True:
            received.wait()
            received.clear()
            while answers:
                yield answers.pop(0)

    import threading  # noqa: PLC0415

    received = threading.Event()
    for response in call(requests()):
        if any(delivery.event.data == b"poison" for delivery in response.deliveries):
            os._exit(3)
        for delivery in response.deliveries:
            print(delivery.event.id, delivery.attempt, flush=True)  # noqa: T201
        settlements = [
            pb.Settlement(token=d.token, verdict=pb.VERDICT_ACK) for d in response.deliveries
        ]
        answers.append(pb.SubscribeRequest(settlements=settlements, credit=len(settlements)))
        received.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
