-- Posts a small notification to a random user, with an API key, and tells the figures as one line of JSON.
local words = {["Authorization"] = "Bearer " .. os.getenv("BENCH_PROOF"), ["Content-Type"] = "application/json"}
local threads = 0

function setup(thread)
    threads = threads + 1
    thread:set("seed", threads)
end

function init()
    math.randomseed(os.time() * 10 + seed)
end

function request()
    local body = '{"user_id":"user-' .. math.random(1, 100000) .. '","event_name":"comment.created",'
        .. '"title":"A comment on your post","body":"It was worth reading, thank you."}'
    return wrk.format("POST", "/api/notifications", words, body)
end

function done(summary, latency, requests)
    local failed = summary.errors
    io.write(string.format('{"requests":%d,"seconds":%f,"failed":%d,"p50":%d,"p99":%d}\n', summary.requests,
        summary.duration / 1e6, failed.connect + failed.read + failed.write + failed.status + failed.timeout,
        latency:percentile(50), latency:percentile(99)))
end
