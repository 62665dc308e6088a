//! What vmem assumes of device memory that is taken as pages, and mapped where it is needed.
//!
//! Invariant: as that of all parts. Bytes are compared with a model that lives on the host. Called
//! by `parts`.

use std::ops::Range;

use rand::RngCore;
use serde_json::{Map, Value};

use super::memory::{down, up};
use super::*;
use crate::user::{BatchCopy, Pages, Paging, Pinned, User};

/// The pages of addresses that a test has, and of memory.
const ADDRESSES: usize = 8;
const MEMORY: usize = 4;
/// The adjacent ones.
const ROW: Range<usize> = 1..4;
/// How many times its memory a tier reserves in addresses, at best and at least.
const TIMES: [usize; 3] = [16, 8, 4];

/// What a page that moves needs.
const CALLS: [&str; 3] = ["cuMemMap", "cuMemSetAccess", "cuMemUnmap"];

/// One of these.
type Call<'a> = &'a dyn Fn() -> Result<(), DriverError>;

/// Pages, with the host memory that their bytes come from and go to.
struct Field<'a> {
    user: &'a User,
    pages: Pages,
    source: Pinned,
    target: Pinned,
}

impl Field<'_> {
    /// Compares what is at an address with what must be.
    fn same(&mut self, what: &str, at: u64, expected: &[u8]) -> Result<()> {
        let stream = &self.user.stream;
        let found = &mut self.target.bytes_mut()[..expected.len()];
        found.fill(0xEE);
        let copied = down(found, at, stream);
        ensure!(copied == 0, "{what}: a copy down: {copied}");
        stream.synchronize().with_context(|| what.to_owned())?;
        if found != expected {
            let at = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
            anyhow::bail!("{what}: byte {at} of {} differs", expected.len());
        }
        Ok(())
    }

    fn page_bytes(&self) -> usize {
        self.pages.page_bytes()
    }
}

pub(super) fn pages(env: &Env) -> Result<Outcome> {
    let user = env.user()?;
    let paging = match Paging::find(&user)? {
        Ok(paging) => paging,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    let [minimum, recommended] = paging.granularity()?;
    let fits = minimum > 0 && recommended.is_multiple_of(minimum);
    ensure!(fits, "a granularity of at least {minimum}, and {recommended} recommended");
    let mut figures = Map::new();
    figures.insert("granularity".into(), json!({"minimum": minimum, "recommended": recommended}));
    figures.insert("addresses".into(), addresses(&paging)?);
    // Those of a small tier, and larger ones, as a large tier has.
    for page in [paging.page_bytes()?, 4 * paging.page_bytes()?] {
        let what = format!("pages of {} KiB", page / KIB);
        let tried = one_size(env, &user, &paging, page).with_context(|| what.clone())?;
        figures.insert(what, tried);
    }
    Ok(Outcome::Passed(figures.into()))
}

/// As many times the memory of the device in addresses as a tier would like.
fn addresses(paging: &Paging) -> Result<Value> {
    let page = paging.page_bytes()?;
    let (_, total) = result::mem_get_info()?;
    let mut tried = Map::new();
    for times in TIMES {
        let bytes = total / page * page * times;
        let begun = Instant::now();
        let reserved = paging.reserve(bytes, page);
        let took = micros(begun);
        let freed = reserved.and_then(|base| paging.free(base, bytes));
        tried.insert(
            format!("{times} times the memory"),
            json!({"bytes": bytes, "us": took, "code": code(reserved), "freed": code(freed)}),
        );
        ensure!(reserved.is_err() || freed.is_ok(), "addresses are not given back: {tried:?}");
    }
    let any = tried.values().any(|tried| tried["code"] == 0);
    ensure!(any, "not even the fewest addresses that a tier needs: {tried:?}");
    Ok(tried.into())
}

fn one_size(env: &Env, user: &User, paging: &Paging, page: usize) -> Result<Value> {
    let pages = paging.pages(page, ADDRESSES, MEMORY)?;
    ensure!(pages.address(0).is_multiple_of(page as u64), "addresses that are not aligned");
    let all = ROW.len() * page;
    let mut source = user.registered(all)?;
    let target = user.registered(all)?;
    env.rng().fill_bytes(source.bytes_mut());
    let mut field = Field { user, pages, source, target };
    let mut model = field.source.bytes().to_vec();
    let batch = borders(&mut field, &mut model).context("copies and kernels over borders")?;
    moved(&mut field, &mut model).context("a page that moves")?;
    let moves = beside_kernels(env, &mut field, &mut model).context("moves beside kernels")?;
    let times = times(&field).context("times")?;
    let captured = captured(&field).context("beside a capture")?;
    field.same("after all", field.pages.address(ROW.start), &model)?;
    Ok(json!({
        "a_batch_over_a_border": batch, "moves_beside_kernels": moves, "us": times,
        "beside_a_capture": captured,
    }))
}

/// Three adjacent mappings are one memory, for copies, fills and kernels.
fn borders(field: &mut Field<'_>, model: &mut [u8]) -> Result<Value> {
    let user = field.user;
    let page = field.page_bytes();
    let stream = &user.stream;
    for memory in 0..ROW.len() {
        field.pages.map(memory, ROW.start + memory).context("cuMemMap")?;
    }
    field.pages.allow(ROW).context("cuMemSetAccess of three mappings in one call")?;
    let at = field.pages.address(ROW.start);
    let copied = up(at, field.source.bytes(), stream);
    ensure!(copied == 0, "a copy up over three mappings: {copied}");
    field.same("a copy up over three mappings", at, model)?;
    // Lengths and places of no alignment.
    let first = page - 3001..page + 5003;
    field.same("a copy down over a border", at + first.start as u64, &model[first.clone()])?;
    let second = 2 * page - 777..2 * page + 1445;
    // SAFETY: memory of this part, which waits below.
    unsafe {
        result::memset_d8_async(at + second.start as u64, 0x5A, second.len(), stream.cu_stream())
    }
    .context("a fill over a border")?;
    model[second].fill(0x5A);
    field.same("a fill over a border", at, model)?;
    // SAFETY: as above.
    unsafe { user.add(at + first.start as u64, first.len(), 3, stream) }?;
    model[first].iter_mut().for_each(|byte| *byte = byte.wrapping_add(3));
    let from = 2 * page - 4099;
    let to = page - 1021;
    let len = 6007;
    // SAFETY: as above; the two do not overlap.
    unsafe { user.copy(at + to as u64, at + from as u64, len, stream) }?;
    model.copy_within(from..from + len, to);
    field.same("kernels over borders", at, model)?;
    let batch = match BatchCopy::find() {
        Ok(batch) => batch,
        Err(why) => return Ok(why.into()),
    };
    let places = [page - 2003, 2 * page - 5];
    let froms = [64_usize, 9000];
    let mut lens = [4001_usize, 1999];
    for ((&to, &from), &len) in places.iter().zip(&froms).zip(&lens) {
        model[to..to + len].copy_from_slice(&field.source.bytes()[from..from + len]);
    }
    let base = field.source.address().expose_provenance();
    let mut to = places.map(|place| at + place as u64);
    let mut from = froms.map(|from| (base + from) as u64);
    // SAFETY: memory of this part, which waits below.
    unsafe { batch.copy(&mut to, &mut from, &mut lens, stream) }?;
    field.same("a batch over borders", at, model)?;
    Ok("its bytes are right".into())
}

/// Memory keeps its bytes where it goes, and its addresses have those of what comes to them.
fn moved(field: &mut Field<'_>, model: &mut [u8]) -> Result<()> {
    let page = field.page_bytes();
    let stream = &field.user.stream;
    let at = field.pages.address(ROW.start);
    let elsewhere = field.pages.address(6);
    let kept = model[page..2 * page].to_vec();
    // From the middle of what got its access in one call.
    field.pages.unmap(2..3).context("cuMemUnmap")?;
    field.pages.map(1, 6).context("cuMemMap")?;
    field.pages.allow(6..7).context("cuMemSetAccess")?;
    field.same("a page elsewhere", elsewhere, &kept)?;
    field.pages.map(3, 2).context("cuMemMap of another page to the same addresses")?;
    field.pages.allow(2..3).context("cuMemSetAccess")?;
    let copied = up(field.pages.address(2), &field.source.bytes()[..page], stream);
    ensure!(copied == 0, "a copy to the same addresses: {copied}");
    model[page..2 * page].copy_from_slice(&field.source.bytes()[..page]);
    field.same("another page between the two", at, model)?;
    field.same("the page elsewhere, still", elsewhere, &kept)?;
    // All in one call, though access was given in several; and in the opposite order.
    field.pages.unmap(ROW).context("cuMemUnmap of three mappings in one call")?;
    field.pages.unmap(6..7).context("cuMemUnmap")?;
    for (memory, place) in [(2, 1), (1, 2), (0, 3)] {
        field.pages.map(memory, place).context("cuMemMap")?;
    }
    field.pages.allow(ROW).context("cuMemSetAccess")?;
    let (first, rest) = model.split_at_mut(page);
    let (second, third) = rest.split_at_mut(page);
    first.swap_with_slice(third);
    second.copy_from_slice(&kept);
    field.same("pages in the opposite order", at, model)
}

/// A page moves and is copied to while kernels work on its neighbours.
fn beside_kernels(env: &Env, field: &mut Field<'_>, model: &mut [u8]) -> Result<Value> {
    let user = field.user;
    let page = field.page_bytes();
    let kernels = user.context.new_stream()?;
    let at = field.pages.address(ROW.start);
    let moves = env.scaled(200, 12);
    let adds = env.scaled(64, 2);
    let mut beside = 0;
    let mut longest = [0.0_f64; 3];
    for nth in 0..moves {
        for _ in 0..adds {
            // SAFETY: memory of this part, which waits below.
            unsafe { user.add(at, model.len(), 1, &kernels) }?;
        }
        let ended = kernels.record_event(None)?;
        let to = 5 + nth % 3;
        let mut timed = |call: usize, called: Call<'_>| {
            let begun = Instant::now();
            called().with_context(|| format!("{} beside kernels", CALLS[call]))?;
            longest[call] = longest[call].max(micros(begun));
            anyhow::Ok(())
        };
        timed(0, &|| field.pages.map(3, to))?;
        timed(1, &|| field.pages.allow(to..to + 1))?;
        if nth > 0 {
            let before = field.source.bytes()[nth - 1..][..page].to_vec();
            field.same("the page that moved", field.pages.address(to), &before)?;
        }
        let copied =
            up(field.pages.address(to), &field.source.bytes()[nth..][..page], &user.stream);
        user.stream.synchronize()?;
        ensure!(copied == 0, "a copy beside kernels: {copied}");
        timed(2, &|| field.pages.unmap(to..to + 1))?;
        beside += usize::from(!ended.try_is_complete()?);
    }
    kernels.synchronize()?;
    let added = (moves * adds) as u8;
    model.iter_mut().for_each(|byte| *byte = byte.wrapping_add(added));
    field.same("what kernels wrote meanwhile", at, model)?;
    let longest: Map<_, _> =
        CALLS.iter().zip(longest).map(|(name, us)| ((*name).into(), us.into())).collect();
    Ok(json!({"moves": moves, "ended_before_the_kernels": beside, "longest_call_us": longest}))
}

fn micros(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e6
}

/// How long the calls take while nothing runs and beside a kernel, and whether they wait for it.
fn times(field: &Field<'_>) -> Result<Value> {
    const QUIET: usize = 21;
    const BESIDE: usize = 5;
    let pages = &field.pages;
    let kernels = field.user.context.new_stream()?;
    let calls: [Call<'_>; 3] = [&|| pages.map(3, 6), &|| pages.allow(6..7), &|| pages.unmap(6..7)];
    let mut quiet = [const { Vec::new() }; 3];
    for _ in 0..QUIET {
        for (nth, call) in calls.iter().enumerate() {
            let begun = Instant::now();
            call().context(CALLS[nth])?;
            quiet[nth].push(micros(begun));
        }
    }
    let mut busy = [const { Vec::new() }; 3];
    let mut waited = [true; 3];
    for _ in 0..BESIDE {
        for (nth, call) in calls.iter().enumerate() {
            // A kernel of its own for each: the call before must not have waited for it.
            field.user.spin(SPIN, &kernels)?;
            let ended = kernels.record_event(None)?;
            let begun = Instant::now();
            call().with_context(|| format!("{} beside a kernel", CALLS[nth]))?;
            busy[nth].push(micros(begun));
            // A busy machine may be later than the kernel: once is enough.
            waited[nth] &= ended.try_is_complete()?;
            kernels.synchronize()?;
        }
    }
    let middle = |times: &mut Vec<f64>| {
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let mut figures = Map::new();
    for (nth, name) in CALLS.into_iter().enumerate() {
        figures.insert(
            name.into(),
            json!({
                "idle": middle(&mut quiet[nth]), "beside_a_kernel": middle(&mut busy[nth]),
                "waited_for_the_kernel": waited[nth],
            }),
        );
    }
    Ok(figures.into())
}

/// What the calls say on another thread, while a stream is captured in global mode.
fn captured(field: &Field<'_>) -> Result<Value> {
    let pages = &field.pages;
    let stream = &field.user.stream;
    let beside = |relaxed: bool| {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: a stream of this part.
        unsafe { result::stream::begin_capture(stream.cu_stream(), mode) }.context("a capture")?;
        let calls = || {
            pages.bind()?;
            let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            if relaxed {
                // SAFETY: a place for the mode.
                unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
            }
            let mapped = code(pages.map(3, 6));
            // The others need something that is mapped.
            let is_mapped = mapped == 0;
            let allowed = is_mapped.then(|| code(pages.allow(6..7)));
            let unmapped = is_mapped.then(|| code(pages.unmap(6..7)));
            anyhow::Ok([Some(mapped), allowed, unmapped])
        };
        let called = std::thread::scope(|scope| scope.spawn(calls).join());
        // SAFETY: ends the capture that was begun.
        let ended = code(unsafe { result::stream::end_capture(stream.cu_stream()) });
        let codes = called.map_err(|_| anyhow::anyhow!("it panicked"))??;
        if codes[2].is_some_and(|code| code != 0) {
            pages.unmap(6..7).context("cuMemUnmap after the capture")?;
        }
        anyhow::Ok((codes, ended))
    };
    let (careful, after_careful) = beside(true)?;
    let (careless, after_careless) = beside(false)?;
    ensure!(
        careful == [Some(0); 3] && after_careful == 0,
        "a relaxed thread: {careful:?}, the capture: {after_careful}"
    );
    let told = |[map, allow, unmap]: [Option<i32>; 3], ended: i32| {
        json!({
            "cuMemMap": map, "cuMemSetAccess": allow, "cuMemUnmap": unmap,
            "end_of_the_capture": ended,
        })
    };
    Ok(json!({
        "on_a_relaxed_thread": told(careful, after_careful),
        "on_another_thread": told(careless, after_careless),
    }))
}
