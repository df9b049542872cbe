// How a Node app publishes and consumes through the sidecar, with stubs generated from proto/.
import net from "node:net";
import { PassThrough } from "node:stream";
import { isDeepStrictEqual, parseArgs } from "node:util";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { Durability } from "./gen/sidecar/v1/event_pb.js";
import { PubSub, Verdict } from "./gen/sidecar/v1/pubsub_pb.js";

const BATCH_SIZE = 10; // events in one publish request
const WINDOW = 16; // deliveries we are ready to hold at once

const { values: options } = parseArgs({
  options: {
    target: { type: "string", default: "127.0.0.1:7400" }, // or unix:/path
    topic: { type: "string", default: "quickstart.node" },
    subscription: { type: "string", default: "quickstart-node" }, // durable; shared by all who use the name
    count: { type: "string", default: "50" },
  },
});

/** A client of the sidecar at "unix:/path" or "host:port". Plain text is right: it is on this machine. */
function connect(target) {
  const path = target.startsWith("unix:") && target.slice("unix:".length);
  const transport = createGrpcTransport({
    baseUrl: path ? "http://localhost" : `http://${target}`,
    nodeOptions: path ? { createConnection: () => net.connect(path) } : {},
    defaultTimeoutMs: 20_000,
  });
  return createClient(PubSub, transport);
}

function orders(count) {
  const started = Date.now();
  return Array.from({ length: count }, (_, i) => ({
    id: `order-${started}-${i}`, // optional; with your own, publishing again is safe
    type: "orders.created",
    key: `customer-${i % 5}`, // in order, one at a time, per key
    dataContentType: "application/json",
    data: Buffer.from(JSON.stringify({ order: i })),
  }));
}

/** Sends all batches without waiting in between, and checks the receipt of every event. */
async function publish(client, topic, events) {
  async function* requests() {
    for (let at = 0; at < events.length; at += BATCH_SIZE) {
      // The sequence is ours to choose, and the answer names it.
      yield { sequence: BigInt(at), topic, events: events.slice(at, at + BATCH_SIZE) };
    }
  }
  const waiting = new Set(events.map((event) => event.id));
  for await (const { sequence, results, failure } of client.publishStream(requests())) {
    if (failure) throw new Error(`batch at ${sequence}: ${failure.reason}: ${failure.message}`);
    for (const { outcome } of results) { // one per event, in order
      if (outcome.case !== "receipt") {
        throw new Error(`batch at ${sequence}: ${outcome.value?.reason}: ${outcome.value?.message}`);
      }
      const { eventId, durability } = outcome.value;
      if (durability !== Durability.STORED || !waiting.delete(eventId)) {
        throw new Error(`batch at ${sequence}: ${eventId} has durability ${Durability[durability]}`);
      }
    }
  }
  return { published: events.length - waiting.size };
}

/** Acks every event, except that it nacks the first delivery of the first one. */
async function consume(client, { topic, subscription }, events) {
  const waiting = new Set(events.map((event) => event.id));
  const got = { delivered: 0, acked: 0, nacked: 0, attempts_of_nacked: 0 };

  function settle({ token, event: { id }, attempt }) {
    if (!waiting.has(id)) throw new Error(`${id} is acked already, or of an earlier run: take a new --topic`);
    got.delivered += 1;
    if (id === events[0].id) got.attempts_of_nacked = attempt;
    if (id === events[0].id && attempt === 1) {
      got.nacked += 1;
      return { token, verdict: Verdict.NACK, delay: durationFromMs(200), reason: "payment-service-busy" };
    }
    got.acked += 1;
    waiting.delete(id);
    return { token, verdict: Verdict.ACK };
  }

  const requests = new PassThrough({ objectMode: true });
  const retry = { initial: durationFromMs(100) };
  const spec = { name: subscription, topic, retry };
  requests.write({ open: { target: { case: "spec", value: spec } }, credit: WINDOW });
  for await (const { deliveries, rejectedSettlements } of client.subscribe(requests)) {
    if (rejectedSettlements.length > 0) { // too late, or settled before
      const reasons = rejectedSettlements.map(({ failure }) => failure?.message);
      throw new Error(`settlements that do not count: ${reasons.join("; ")}`);
    }
    // A delivery uses up one credit: give it back with the settlement.
    const settlements = deliveries.map(settle);
    if (settlements.length > 0) requests.write({ settlements, credit: settlements.length });
    if (waiting.size === 0) requests.end(); // the loop ends when the last settlement has arrived
  }
  return got;
}

async function main() {
  const count = Number(options.count);
  if (!(count >= 1)) throw new Error(`--count is ${options.count}, must be 1 or more`);
  const want = { published: count, delivered: count + 1, acked: count, nacked: 1, attempts_of_nacked: 2 };
  const client = connect(options.target);
  const events = orders(count);
  const got = {
    ...(await publish(client, options.topic, events)),
    ...(await consume(client, options, events)),
  };
  if (!isDeepStrictEqual(got, want)) {
    throw new Error(`counted ${JSON.stringify(got)}, want ${JSON.stringify(want)}`);
  }
  console.log(JSON.stringify(got));
}

const tooLong = setTimeout(() => fail(new Error("not done after 20 s")), 20_000);

function fail(error) {
  console.error(`quickstart: ${options.target}: ${error.message}`);
  process.exit(1);
}

await main().catch(fail);
clearTimeout(tooLong);
