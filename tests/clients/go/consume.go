package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	sidecar "quickstart/gen/sidecar/v1"
)

const window = 16 // deliveries we are ready to hold at once

// consume acks every event, except that it nacks the first delivery of the first one.
func consume(ctx context.Context, client sidecar.PubSubClient, events []*sidecar.Event, got *tally) error {
	stream, err := client.Subscribe(ctx)
	if err != nil {
		return err
	}
	retry := &sidecar.RetryPolicy{Initial: durationpb.New(100 * time.Millisecond)}
	spec := &sidecar.SubscriptionSpec{Name: *subscription, Topic: *topic, Retry: retry}
	open := &sidecar.SubscribeOpen{Target: &sidecar.SubscribeOpen_Spec{Spec: spec}}
	// A Send that fails needs no check of its own: the next Recv says why.
	stream.Send(&sidecar.SubscribeRequest{Open: open, Credit: window})

	waiting, nacked := ids(events), events[0].Id
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) { // we closed, and the last settlement has arrived
			return nil
		}
		if err != nil {
			return fmt.Errorf("%d events to go: %w", len(waiting), err)
		}
		if len(response.RejectedSettlements) > 0 { // too late, or settled before
			return fmt.Errorf("settlements that do not count: %v", response.RejectedSettlements)
		}
		// A delivery uses up one credit: give it back with the settlement.
		request := &sidecar.SubscribeRequest{Credit: uint32(len(response.Deliveries))}
		for _, delivery := range response.Deliveries {
			id, settlement := delivery.Event.Id, &sidecar.Settlement{Token: delivery.Token}
			if !waiting[id] {
				return fmt.Errorf("%s is acked already, or of an earlier run: take a new --topic", id)
			}
			got.Delivered++
			if id == nacked {
				got.AttemptsOfNacked = delivery.Attempt
			}
			if id == nacked && delivery.Attempt == 1 {
				settlement.Verdict = sidecar.Verdict_VERDICT_NACK
				settlement.Delay = durationpb.New(200 * time.Millisecond)
				settlement.Reason = "payment-service-busy"
				got.Nacked++
			} else {
				settlement.Verdict = sidecar.Verdict_VERDICT_ACK
				delete(waiting, id)
				got.Acked++
			}
			request.Settlements = append(request.Settlements, settlement)
		}
		if len(request.Settlements) > 0 {
			stream.Send(request)
		}
		if len(waiting) == 0 {
			stream.CloseSend()
		}
	}
}
