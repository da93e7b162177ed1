-- Asks for the inbox of a random user: 30 rows and the unread count. One path and header a line of the file.
local asked, threads = {}, 0

function setup(thread)
    threads = threads + 1
    thread:set("seed", threads)
end

function init()
    math.randomseed(os.time() * 10 + seed)
    for line in io.lines(os.getenv("BENCH_READERS")) do
        local path, proof = line:match("^(%S+) (%S+)$")
        asked[#asked + 1] = wrk.format("GET", path, {["Authorization"] = "Bearer " .. proof})
    end
end

function request()
    return asked[math.random(1, #asked)]
end

function done(summary, latency, requests)
    local failed = summary.errors
    io.write(string.format('{"requests":%d,"seconds":%f,"failed":%d,"p50":%d,"p99":%d}\n', summary.requests,
        summary.duration / 1e6, failed.connect + failed.read + failed.write + failed.status + failed.timeout,
        latency:percentile(50), latency:percentile(99)))
end
