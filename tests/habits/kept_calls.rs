//! Scenario 35, the table: sixty-four futures of each public call are polled once and then left
//! alone.
//!
//! Excluded: a shared, counted thing (staging, a permit, a turn, space, a pin, a gate) that is held
//! by a future that is not polled. Noticed by other tasks whose calls are not done well before the
//! wait timeout, by a kept future that does not return its bytes when it is polled again, and by a
//! `close` that waits for one.

use vmem::VirtualMemoryError;

use crate::calls::{Call, LEN};
use crate::harness::{BOUND, CLOSE_BOUND, THREADS, Threads, assert_none, run, succeeds, within};
use crate::keep::Kept;
use crate::kept_world::{STATES, State, keep};
use crate::stores::{MIB, Place, Sizes, cold, config, open};

fn simulated(call: Call) {
    let states = STATES.iter().flat_map(|&state| THREADS.map(|threads| (state, threads)));
    assert_none(&keep(Place::Simulated, call, &states.collect::<Vec<_>>()));
}

fn real(call: Call) {
    let cases = [
        (State::HostCold, Threads::Two),
        (State::HostFull, Threads::One),
        (State::StagingBusy, Threads::Two),
    ];
    assert_none(&keep(Place::Real, call, &cases));
}

macro_rules! table {
    ($($name:ident: $call:ident,)*) => {
        mod simulated {
            $(#[test]
            fn $name() {
                super::simulated(super::Call::$call);
            })*
        }
        mod real {
            $(#[test]
            fn $name() {
                super::real(super::Call::$call);
            })*
        }
    };
}

table! {
    kept_reads_delay_nobody: Read,
    kept_reads_of_parts_delay_nobody: ReadAt,
    kept_small_reads_delay_nobody: ReadAtSmall,
    kept_copies_delay_nobody: ReadInto,
    kept_reads_with_a_range_delay_nobody: ReadWith,
    kept_background_reads_delay_nobody: ReadBackground,
    kept_promoting_reads_delay_nobody: ReadToStay,
    kept_sets_delay_nobody: ReadMany,
    kept_streams_delay_nobody: Stream,
    kept_writes_delay_nobody: Write,
    kept_partial_writes_delay_nobody: WriteAt,
    kept_writes_in_place_delay_nobody: WriteWith,
    kept_streamed_writes_delay_nobody: WriteStream,
    kept_allocations_delay_nobody: Allocate,
    kept_allocations_on_disk_delay_nobody: AllocateOnDisk,
    kept_puts_delay_nobody: Put,
    kept_puts_on_disk_delay_nobody: PutOnDisk,
    kept_frees_delay_nobody: Free,
    kept_promotions_delay_nobody: Promote,
    kept_demotions_delay_nobody: Demote,
    kept_pins_delay_nobody: Pin,
    kept_prefetches_delay_nobody: Prefetch,
    kept_prefetches_of_sets_delay_nobody: PrefetchMany,
    kept_flushes_delay_nobody: Flush,
    kept_flushes_of_all_delay_nobody: FlushAll,
    kept_named_allocations_delay_nobody: AllocateNamed,
    kept_named_puts_delay_nobody: PutNamed,
    kept_openings_of_names_delay_nobody: OpenNamed,
    kept_renames_delay_nobody: RenameNamed,
    kept_removals_delay_nobody: RemoveNamed,
    kept_changes_of_metadata_delay_nobody: SetMetadata,
    kept_listings_delay_nobody: Names,
    kept_conditional_puts_delay_nobody: PutNamedWith,
    kept_streamed_named_writes_delay_nobody: WriteStreamNamed,
    kept_openings_of_entries_delay_nobody: OpenEntry,
    kept_adoptions_delay_nobody: Adopt,
    kept_removals_of_many_delay_nobody: RemoveMany,
}

/// A snapshot needs a directory below.
#[test]
fn kept_snapshots_delay_nobody() {
    real(Call::Snapshot);
}

/// A `close` that is left alone still ends the store: its directory can be opened again.
#[test]
fn kept_close_ends_the_store() {
    let mut complaints = Vec::new();
    for threads in THREADS {
        let found = run(threads, || async {
            let sizes = Sizes { space: 2 * MIB, disk: 32 * MIB };
            let store = open(Place::Real, sizes, |builder| builder).await;
            let vmem = &store.vmem;
            let objects = cold(vmem, 0, 8, LEN).await;
            let named = vmem.allocate_named("changed", 3, crate::stores::HOST).await.unwrap();
            vmem.write(&named, b"end").await.unwrap();
            let kept = Kept::once(vmem.clone().close()).await;
            for handle in &objects {
                match within("read", BOUND, vmem.read(handle)).await? {
                    Ok(_) | Err(VirtualMemoryError::Closed) => {}
                    Err(error) => return Err(format!("read: {error}")),
                }
            }
            // The second one waits for the end, which the first one has begun.
            let second = within("the second close", CLOSE_BOUND, vmem.clone().close()).await?;
            if !matches!(second, Ok(()) | Err(VirtualMemoryError::Closed)) {
                return Err(format!("the second close: {second:?}"));
            }
            let path = store.dir.path().join("store");
            let again = config(sizes, |builder| builder.disk_path(path)).build().unwrap();
            let again = succeeds("open", BOUND, vmem::open(again)).await?;
            let named = succeeds("open_named", BOUND, again.open_named("changed")).await?;
            let read = succeeds("read", BOUND, again.read(&named)).await?;
            if read != b"end"[..] {
                return Err("close did not flush what was changed".into());
            }
            succeeds("close", CLOSE_BOUND, again.close()).await?;
            succeeds("the kept close", BOUND, kept.finish()).await
        });
        complaints.extend(found.err().map(|why| format!("{threads:?}: {why}")));
    }
    assert_none(&complaints);
}
