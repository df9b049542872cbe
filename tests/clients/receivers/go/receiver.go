// An app that is pushed to, with nothing but the CloudEvents SDK: it knows no sidecar.
//
// It prints each event as a line of JSON, and fails the one of --fail the first time it comes.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	cloudevents "github.com/cloudevents/sdk-go/v2"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "host:port, or unix:/path")
	batches := flag.Bool("batches", false, "take batches, which the SDK's client does not")
	fail := flag.String("fail", "", "id of an event to fail once")
	flag.Parse()

	network, place := "tcp", *listen
	if path, isPath := strings.CutPrefix(place, "unix:"); isPath {
		network, place = "unix", path
	}
	listener, err := net.Listen(network, place)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("{\"listening\":%q}\n", listener.Addr().String())

	app := &app{fail: *fail}
	if *batches {
		log.Fatal(http.Serve(listener, http.HandlerFunc(app.takeBatch)))
	}
	client, err := cloudevents.NewClientHTTP(
		cehttp.WithListener(listener),
		cehttp.WithRequestDataAtContextMiddleware(),
	)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(client.StartReceiver(context.Background(), app.receive))
}

type app struct {
	mutex sync.Mutex
	fail  string
}

// receive is what one writes with the SDK: nil is 200, an error 500.
func (a *app) receive(ctx context.Context, event cloudevents.Event) error {
	return a.take(event, cehttp.RequestDataFromContext(ctx).Header)
}

func (a *app) takeBatch(writer http.ResponseWriter, request *http.Request) {
	events, err := cehttp.NewEventsFromHTTPRequest(request)
	if err != nil {
		http.Error(writer, err.Error(), http.StatusBadRequest)
		return
	}
	status := http.StatusNoContent
	for _, event := range events {
		if a.take(event, request.Header) != nil {
			status = http.StatusInternalServerError
		}
	}
	writer.WriteHeader(status)
}

func (a *app) take(event cloudevents.Event, header http.Header) error {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	headers := map[string]string{}
	for name := range header {
		headers[strings.ToLower(name)] = header.Get(name)
	}
	failed := event.ID() == a.fail
	err := json.NewEncoder(os.Stdout).Encode(map[string]any{
		"id":              event.ID(),
		"source":          event.Source(),
		"type":            event.Type(),
		"time":            event.Time().Format(time.RFC3339Nano),
		"subject":         event.Subject(),
		"datacontenttype": event.DataContentType(),
		"data":            event.Data(), // bytes, in base64
		"extensions":      event.Extensions(),
		"failed":          failed,
		"headers":         headers,
	})
	if failed {
		a.fail = ""
		return errors.New("on purpose")
	}
	return err
}
