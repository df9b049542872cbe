package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	sidecar "quickstart/gen/sidecar/v1"
)

const batchSize = 10 // events in one request

// publish sends all batches without waiting in between, and checks the receipt of every event.
func publish(ctx context.Context, client sidecar.PubSubClient, events []*sidecar.Event, got *tally) error {
	stream, err := client.PublishStream(ctx)
	if err != nil {
		return err
	}
	go func() {
		for at := 0; at < len(events); at += batchSize {
			batch := events[at:min(at+batchSize, len(events))]
			// The sequence is ours to choose, and the answer names it.
			request := &sidecar.PublishStreamRequest{Sequence: uint64(at), Topic: *topic, Events: batch}
			if stream.Send(request) != nil {
				return // the stream is over, and Recv below says why
			}
		}
		stream.CloseSend()
	}()
	waiting := ids(events)
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) { // everything is answered
			return nil
		}
		if err != nil {
			return err
		}
		if response.Failure != nil {
			return fmt.Errorf("batch at %d: %v", response.Sequence, response.Failure)
		}
		for _, result := range response.Results { // one per event, in order: a receipt or a failure
			receipt := result.GetReceipt()
			if receipt.GetDurability() != sidecar.Durability_DURABILITY_STORED || !waiting[receipt.EventId] {
				return fmt.Errorf("batch at %d: %v", response.Sequence, result)
			}
			delete(waiting, receipt.EventId)
			got.Published++
		}
	}
}
