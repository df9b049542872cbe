// How a Go app publishes and consumes through the sidecar, with nothing but generated stubs and grpc-go.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	sidecar "quickstart/gen/sidecar/v1"
)

//go:generate buf generate

var (
	target       = flag.String("target", "127.0.0.1:7400", "the sidecar: unix:/path or host:port")
	topic        = flag.String("topic", "quickstart.go", "publish to it, consume from it")
	subscription = flag.String("subscription", "quickstart-go", "durable; shared by all who use the name")
	count        = flag.Int("count", 50, "events to publish, at least 1")
)

// What happened, counted.
type tally struct {
	Published        int    `json:"published"`
	Delivered        int    `json:"delivered"`
	Acked            int    `json:"acked"`
	Nacked           int    `json:"nacked"`
	AttemptsOfNacked uint32 `json:"attempts_of_nacked"`
}

func main() {
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	got, want := tally{}, tally{*count, *count + 1, *count, 1, 2}
	err := run(ctx, &got)
	if err == nil && got != want {
		err = fmt.Errorf("counted %+v, want %+v", got, want)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "quickstart: %s: %v\n", *target, err)
		os.Exit(1)
	}
	json.NewEncoder(os.Stdout).Encode(got)
}

func run(ctx context.Context, got *tally) error {
	if *count < 1 {
		return fmt.Errorf("--count is %d, must be 1 or more", *count)
	}
	// Plain text is right here: the sidecar listens on this machine only.
	conn, err := grpc.NewClient(*target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := sidecar.NewPubSubClient(conn)

	events, started := make([]*sidecar.Event, *count), time.Now().UnixNano()
	for i := range events {
		events[i] = &sidecar.Event{
			Id:              fmt.Sprintf("order-%d-%d", started, i), // with your own, publishing again is safe
			Type:            "orders.created",
			Key:             fmt.Sprintf("customer-%d", i%5), // in order, one at a time, per key
			DataContentType: "application/json",
			Data:            fmt.Appendf(nil, `{"order":%d}`, i),
		}
	}
	if err := publish(ctx, client, events, got); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if err := consume(ctx, client, events, got); err != nil {
		return fmt.Errorf("consume: %w", err)
	}
	return nil
}

func ids(events []*sidecar.Event) map[string]bool {
	set := make(map[string]bool, len(events))
	for _, event := range events {
		set[event.Id] = true
	}
	return set
}
