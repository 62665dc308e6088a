-- The requests of wrk for `load.sh --wrk SECONDS`: reads of random objects, each compared byte for byte.
-- There are 16 objects of each letter, each that letter, 64 KiB times. The letter is in its metadata too, since wrk does not
-- say which request an answer is of.
local LETTERS, COPIES, LEN = 26, 16, 65536
local bodies, threads = {}, {}

function setup(thread)
    table.insert(threads, thread)
    thread:set("number", #threads)
end

function init(args)
    wrong, compared, busy = 0, 0, 0
    math.randomseed(os.time() + number)
    for n = 0, LETTERS - 1 do
        local letter = string.char(97 + n)
        bodies[letter] = string.rep(letter, LEN)
    end
end

function request()
    local letter = string.char(97 + math.random(0, LETTERS - 1))
    return wrk.format("GET", "/objects/wrk/" .. letter .. "-" .. math.random(0, COPIES - 1))
end

function response(status, headers, body)
    if status == 503 then
        busy = busy + 1
        return
    end
    local letter
    for name, value in pairs(headers) do
        if string.lower(name) == "x-object-meta-letter" then
            letter = value
        end
    end
    compared = compared + 1
    if status ~= 200 or body ~= bodies[letter] then
        wrong = wrong + 1
    end
end

function done(summary, latency, requests)
    local wrong, compared, busy = 0, 0, 0
    for _, thread in ipairs(threads) do
        wrong = wrong + thread:get("wrong")
        compared = compared + thread:get("compared")
        busy = busy + thread:get("busy")
    end
    local lost = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
    io.write(string.format("%d bodies compared, %d wrong, %d answers lost, %d busy\n", compared, wrong, lost, busy))
    if wrong > 0 or lost > 0 or compared == 0 then
        os.exit(1)
    end
end
