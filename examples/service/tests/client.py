"""A client of the service, by the standard library alone: chunked PUTs, ranges, conditions."""
import http.client
import random
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)


def ask(method, path, body=None, headers={}, chunked=False):
    connection.request(method, path, body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    return answer, answer.read()


def expect(answer, status):
    assert answer.status == status, (answer.status, answer.headers)


random.seed(1)
for length in [0, 1, 65536, 65537, 2_000_000]:
    whole = random.randbytes(length)
    pieces = (whole[at : at + 50_000] for at in range(0, length, 50_000))
    headers = {"Transfer-Encoding": "chunked", "X-Object-Meta-Length": str(length)}
    answer, _ = ask("PUT", f"/objects/python/{length}", pieces, headers, chunked=True)
    expect(answer, 201)
    tag = answer.headers["ETag"]
    answer, body = ask("GET", f"/objects/python/{length}")
    expect(answer, 200)
    assert body == whole and answer.headers["X-Object-Meta-Length"] == str(length)
    answer, body = ask("GET", f"/objects/python/{length}", headers={"If-None-Match": tag})
    expect(answer, 304)
    assert body == b""
    for _ in range(20 if length else 0):
        first = random.randrange(length)
        last = random.randrange(first, length + 100)
        answer, body = ask("GET", f"/objects/python/{length}", headers={"Range": f"bytes={first}-{last}"})
        expect(answer, 206)
        assert body == whole[first : last + 1]
    answer, _ = ask("GET", f"/objects/python/{length}", headers={"Range": f"bytes={length}-"})
    expect(answer, 416)
    assert answer.headers["Content-Range"] == f"bytes */{length}"
answer, _ = ask("DELETE", "/objects/python/1")
expect(answer, 204)
answer, _ = ask("GET", "/objects/python/1")
expect(answer, 404)
print("all as stored")
