// An app that is pushed to, with nothing but the CloudEvents SDK: it knows no sidecar.
//
// It prints each event as a line of JSON, and fails the one of --fail the first time it comes.
import http from "node:http";
import { parseArgs } from "node:util";
import { HTTP } from "cloudevents";

const { values: options } = parseArgs({
  options: {
    listen: { type: "string", default: "127.0.0.1:8080" }, // or unix:/path
    batches: { type: "boolean" }, // taken in any case
    fail: { type: "string", default: "" },
  },
});
let fail = options.fail;

const server = http.createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const bytes = Buffer.concat(chunks);
  // The SDK takes text, as body parsers give it, and leaves bytes as they are.
  const binary = request.headers["content-type"] === "application/octet-stream";
  try {
    const received = HTTP.toEvent({
      headers: request.headers,
      body: binary ? bytes : bytes.toString(),
    });
    const failed = [received].flat().filter((event) => !take(event, request.headers));
    response.writeHead(failed.length ? 500 : 204).end();
  } catch (error) {
    response.writeHead(400).end(String(error));
  }
});

function take(event, headers) {
  const { specversion, id, source, type, time, subject, datacontenttype, data, data_base64, ...extensions } =
    event.toJSON();
  const failed = id === fail;
  const shown = { id, source, type, time, subject, datacontenttype, extensions, failed, headers };
  console.log(JSON.stringify({ ...shown, data: bytesOf(event).toString("base64") }));
  if (failed) fail = "";
  return !failed;
}

function bytesOf({ data, datacontenttype }) {
  if (datacontenttype === "application/json") return Buffer.from(JSON.stringify(data));
  return Buffer.from(data); // text, or an array of bytes
}

const path = options.listen.match(/^unix:(.*)/)?.[1];
const [host, port] = options.listen.split(":");
server.listen(path ? { path } : { host, port }, () => {
  const place = server.address();
  console.log(JSON.stringify({ listening: path ?? `${place.address}:${place.port}` }));
});
