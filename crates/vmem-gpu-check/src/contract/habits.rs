//! What users and sizes do to the driver's answers.
//!
//! Invariant: each part ends with a context that works. Called by `contract`.

use std::cell::RefCell;

use super::memory::{Mapped, down, up};
use super::*;

/// A captured event marks no end of work, and a query of one does no lasting harm.
pub(super) fn captured_event(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let stream = &user.stream;
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: a place for the mode. This thread is as those of vmem.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
    let event = user.context.new_event(None)?;
    let capture = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    // SAFETY: a stream of this part.
    unsafe { result::stream::begin_capture(stream.cu_stream(), capture) }.context("a capture")?;
    let recorded = code(event.record(stream));
    let asked = event.try_is_complete();
    let during =
        asked.map_or_else(|DriverError(code)| code as i32, |done| if done { 0 } else { 600 });
    // SAFETY: ends the capture that was begun.
    let ended = code(unsafe { result::stream::end_capture(stream.cu_stream()) });
    // Recorded into a graph it says nothing of work that was queued.
    ensure!(recorded != 0 || during != 0, "a captured event counts as complete");
    // Nothing sticks: the context serves, and so does the event itself.
    event.record(stream).context("recording after the capture")?;
    event.synchronize().context("waiting after the capture")?;
    ensure!(event.try_is_complete()?, "the same event, recorded outside of the capture");
    Ok(Outcome::Passed(json!({"record": recorded, "query": during, "end_of_capture": ended})))
}

/// A host function of a user that takes long keeps notices back, but not what an event says.
pub(super) fn slow_host_function(env: &Env) -> Result<Outcome> {
    const SLOW: Duration = Duration::from_millis(400);
    static RUNS: AtomicBool = AtomicBool::new(false);
    static ENDED: AtomicBool = AtomicBool::new(false);
    static TOLD: AtomicBool = AtomicBool::new(false);
    unsafe extern "C" fn slow(_: *mut c_void) {
        RUNS.store(true, Ordering::SeqCst);
        std::thread::sleep(SLOW);
        ENDED.store(true, Ordering::SeqCst);
    }
    unsafe extern "C" fn notice(_: *mut c_void) {
        TOLD.store(true, Ordering::SeqCst);
    }
    let launch = |stream: &CudaStream, function: unsafe extern "C" fn(*mut c_void)| {
        let stream = stream.cu_stream();
        let nothing = std::ptr::null_mut();
        // SAFETY: the functions need no argument.
        unsafe { result::stream::launch_host_function(stream, function, nothing) }
    };
    let until = |what: &str, flag: &AtomicBool| {
        let begun = Instant::now();
        while !flag.load(Ordering::SeqCst) {
            ensure!(begun.elapsed() < Duration::from_secs(20), "{what} does not come");
            std::thread::yield_now();
        }
        Ok(begun.elapsed())
    };
    let user = env.user()?;
    let work = user.context.new_stream()?;
    let notices = user.context.new_stream()?;
    launch(&user.stream, slow)?;
    until("the slow function", &RUNS)?;
    let event = work.record_event(None)?;
    let begun = Instant::now();
    while !event.try_is_complete()? {
        ensure!(begun.elapsed() < Duration::from_secs(20), "the event does not come");
        std::thread::yield_now();
    }
    let event_us = begun.elapsed().as_micros() as u64;
    let beside = !ENDED.load(Ordering::SeqCst);
    notices.wait(&event)?;
    // On a card this call itself may wait for the function that runs.
    let asked = Instant::now();
    launch(&notices, notice)?;
    let call_us = asked.elapsed().as_micros() as u64;
    let late = until("the notice", &TOLD)?;
    user.stream.synchronize()?;
    // The watchdog of vmem asks events, not notices.
    ensure!(beside, "an event waits for a host function of another stream");
    Ok(Outcome::Passed(json!({
        "slow_ms": SLOW.as_millis() as u64,
        "event_us": event_us,
        "call_us": call_us,
        "notice_late_us": late.as_micros() as u64,
    })))
}

/// Calls on a stream and its events, which name their context, on a thread that has none: each does
/// what it does in the context, or is refused in a way that has vmem enter the context, and never
/// counts work as ended that has not.
pub(super) fn without_a_context(env: &Env) -> Result<Outcome> {
    unsafe extern "C" fn nothing(_: *mut c_void) {}
    let user = env.user()?;
    let event = user.context.new_event(None)?;
    let other = user.context.new_stream()?;
    let captured = user.context.new_stream()?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: a stream of this part.
    unsafe { result::stream::begin_capture(captured.cu_stream(), mode) }.context("a capture")?;
    let begun = Instant::now();
    user.spin(SPIN, &user.stream)?;
    let stream = &user.stream;
    // None of these calls of cudarc binds a context.
    let ask = || {
        ensure!(crate::user::current_context()? == 0, "a new thread has a context");
        // SAFETY: the streams and the event are alive until this thread has ended.
        let capturing = unsafe { result::stream::is_capturing(captured.cu_stream()) };
        // SAFETY: as above.
        let recorded = unsafe { result::event::record(event.cu_event(), stream.cu_stream()) };
        // SAFETY: as above.
        let asked = unsafe { result::event::query(event.cu_event()) };
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as above.
        let ordered =
            unsafe { result::stream::wait_event(other.cu_stream(), event.cu_event(), flags) };
        let stream = other.cu_stream();
        // SAFETY: as above; the function needs no argument.
        let launched =
            unsafe { result::stream::launch_host_function(stream, nothing, std::ptr::null_mut()) };
        anyhow::Ok((capturing, [recorded, asked, ordered, launched].map(code)))
    };
    let asked = std::thread::scope(|scope| scope.spawn(ask).join());
    let (capturing, codes) = asked.map_err(|_| anyhow::anyhow!("it panicked"))??;
    let [recorded, asked, ordered, launched] = codes;
    let is_done = recorded == 0;
    let is_complete = event.try_is_complete()?;
    // A machine that is held up may let the kernel end first: then the event says nothing.
    let is_behind = begun.elapsed() < SPIN;
    // SAFETY: ends the capture that was begun.
    let ended = code(unsafe { result::stream::end_capture(captured.cu_stream()) });
    stream.synchronize()?;
    other.synchronize()?;
    let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    ensure!(capturing != Ok(none), "a capture was not seen");
    ensure!(
        !is_done || !is_behind || !is_complete,
        "recorded behind a kernel, and complete before it"
    );
    ensure!(!is_done || !is_behind || asked != 0, "complete before the kernel that it is behind");
    ensure!(ended == 0, "the capture is broken: {ended}");
    let is_capturing = code(capturing);
    for code in [is_capturing, recorded, asked, ordered, launched] {
        // Done, not ready, or one that has vmem enter the context.
        ensure!([0, 600, 201, 400, 709].contains(&code), "{code} of {codes:?}, {is_capturing}");
    }
    Ok(Outcome::Passed(json!({
        "is_capturing": is_capturing, "record": recorded, "query": asked, "wait": ordered,
        "host_function": launched,
    })))
}

/// Memory of every size that vmem registers in one piece is accepted, and what that costs.
pub(super) fn registration_sizes(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    user.context.bind_to_thread()?;
    let most = env.scaled(1024 * MIB, 16 * MIB);
    let mut figures = serde_json::Map::new();
    for len in [64 * KIB, 2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB] {
        if len > most {
            continue;
        }
        let mut memory = Mapped::new(len)?;
        // Pages that have memory already, as those of the store.
        memory.bytes().fill(1);
        let begun = Instant::now();
        let accepted = memory.register(0, len);
        let register = begun.elapsed();
        ensure!(accepted == 0, "registering {len} bytes: {accepted}");
        let begun = Instant::now();
        let given_up = memory.unregister(0);
        ensure!(given_up == 0, "unregistering {len} bytes: {given_up}");
        let unregister = begun.elapsed();
        figures.insert(
            format!("{}_kib", len / KIB),
            json!({
                "register_us": register.as_micros() as u64,
                "unregister_us": unregister.as_micros() as u64,
            }),
        );
    }
    Ok(Outcome::Passed(figures.into()))
}

/// Which calls wait until the kernels of others have ended: not those on threads of users and
/// lanes.
pub(super) fn waiting(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let kernels = user.context.new_stream()?;
    let event = user.context.new_event(None)?;
    let stream = user.context.new_stream()?;
    let device = user.allocate(4096)?;
    let source = user.pinned(4096)?;
    let mut target = user.pinned(4096)?;
    let mut known = Mapped::new(2 * MIB)?;
    let mut fresh = Mapped::new(2 * MIB)?;
    known.bytes().fill(1);
    fresh.bytes().fill(1);
    ensure!(known.register(0, 2 * MIB) == 0, "registering");
    let context = user.context.cu_ctx();
    let figures = RefCell::new(serde_json::Map::new());
    let waited = RefCell::new(Vec::new());
    // A kernel of its own for each call: what came before must not have waited for it already. One
    // that may be repeated is, for a busy machine can be later than the kernel without waiting.
    let timed = |name: &'static str, tries: usize, call: &mut dyn FnMut() -> Result<()>| {
        for _ in 0..tries {
            user.spin(SPIN, &kernels)?;
            let ended = kernels.record_event(None)?;
            let begun = Instant::now();
            call().context(name)?;
            let took = begun.elapsed();
            let beside = !ended.try_is_complete()?;
            kernels.synchronize()?;
            figures.borrow_mut().insert(name.into(), (took.as_micros() as u64).into());
            if beside {
                return Ok(());
            }
        }
        waited.borrow_mut().push(name);
        anyhow::Ok(())
    };
    let none = |code: i32, what: &str| {
        ensure!(code == 0, "{what}: {code}");
        Ok(())
    };
    timed("record_and_query", 5, &mut || {
        event.record(&stream)?;
        while !event.try_is_complete()? {
            std::thread::yield_now();
        }
        Ok(())
    })?;
    timed("new_event", 5, &mut || {
        user.context.new_event(None)?;
        Ok(())
    })?;
    timed("context", 5, &mut || {
        // SAFETY: the context is retained, and popped below.
        unsafe { sys::cuCtxPushCurrent_v2(context) }.result()?;
        let mut popped = std::ptr::null_mut();
        // SAFETY: a place for what was pushed.
        Ok(unsafe { sys::cuCtxPopCurrent_v2(&mut popped) }.result()?)
    })?;
    timed("memory_info", 5, &mut || {
        result::mem_get_info()?;
        Ok(())
    })?;
    timed("copy_up_and_down", 5, &mut || {
        none(up(device.address, source.bytes(), &stream), "a copy")?;
        none(down(target.bytes_mut(), device.address, &stream), "a copy")?;
        Ok(stream.synchronize()?)
    })?;
    timed("fill", 5, &mut || {
        // SAFETY: this part's memory, on its stream.
        unsafe { result::memset_d8_async(device.address, 0, 4096, stream.cu_stream()) }?;
        Ok(stream.synchronize()?)
    })?;
    timed("new_stream", 5, &mut || {
        user.context.new_stream()?;
        Ok(())
    })?;
    let needed = waited.borrow().clone();
    timed("register", 1, &mut || none(fresh.register(0, 2 * MIB), "registering"))?;
    timed("unregister", 1, &mut || none(known.unregister(0), "unregistering"))?;
    // Freed behind the kernels.
    let mut allocated = None;
    let mut pages = None;
    timed("allocate", 1, &mut || {
        allocated = Some(user.allocate(2 * MIB)?);
        Ok(())
    })?;
    let one = user.allocate(2 * MIB)?;
    let host = user.pinned(2 * MIB)?;
    let mut one = Some(one);
    timed("free", 1, &mut || {
        one.take();
        Ok(())
    })?;
    timed("allocate_host", 1, &mut || {
        pages = Some(user.pinned(2 * MIB)?);
        Ok(())
    })?;
    let mut host = Some(host);
    timed("free_host", 1, &mut || {
        host.take();
        Ok(())
    })?;
    drop((allocated, pages));
    none(fresh.unregister(0), "unregistering")?;
    ensure!(needed.is_empty(), "waited for a kernel of another stream: {needed:?}");
    Ok(Outcome::Passed(json!({
        "waited_for_a_kernel": waited.into_inner(), "us": figures.into_inner(),
    })))
}
