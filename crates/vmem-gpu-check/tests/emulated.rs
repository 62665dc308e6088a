//! Every part of `gpu-check` on the emulated driver, each in a process of its own, as on a card.
//!
//! Invariant: a part that is listed has a test here, by its name, which it has to pass, or is one
//! that needs a card; so a machine without a GPU misses none that can run there, and claims none
//! that cannot.
#![allow(missing_docs, clippy::unwrap_used)]
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn gpu_check(arguments: &[&str], record: &Path) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gpu-check"));
    program.args(["--emulated", "--json"]).arg(record).args(arguments);
    if let Ok(seed) = std::env::var("VMEM_SEED") {
        program.args(["--seed", &seed]);
    }
    program.output().unwrap()
}

fn lines(record: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(record).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Parts that need NVIDIA's checker of memory and a card.
const ON_A_CARD: [&str; 4] = ["sanitizer-planted", "sanitizer-07", "sanitizer-08", "sanitizer-09"];

/// Runs a part, which has to pass.
fn part(name: &str) {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    let output = gpu_check(&["--only", name], &record);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}{errors}");
    let record = lines(&record);
    assert_eq!(record.len(), 1, "{text}");
    assert_eq!(record[0]["part"], name);
    assert_eq!(record[0]["outcome"], "passed", "{text}");
    println!("{text}");
}

#[test]
fn parts_beyond_the_minutes_of_a_run_are_left_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    let only = ["--only", "contract-copies", "contract-events"];
    let output = gpu_check(&[&only[..], &["--minutes", "0"]].concat(), &record);
    assert!(!output.status.success(), "nothing was checked");
    let skipped = lines(&record);
    assert_eq!(skipped.len(), 2);
    for line in &skipped {
        assert_eq!(
            (&line["outcome"], &line["why"]),
            (&"skipped".into(), &"0 minutes are over".into())
        );
    }
    assert!(gpu_check(&only, &record).status.success());
    let all = lines(&record);
    assert_eq!(all.len(), 4);
    assert!(all[2..].iter().all(|line| line["outcome"] == "passed"), "{all:?}");
}

macro_rules! parts {
    ($($test:ident = $name:literal)*) => {
        $(#[test]
        fn $test() {
            part($name);
        })*

        #[test]
        fn every_part_has_a_test() {
            let folder = tempfile::tempdir().unwrap();
            let listed = gpu_check(&["--list"], &folder.path().join("none"));
            let listed = String::from_utf8(listed.stdout).unwrap();
            let listed = listed.lines().filter_map(|line| line.split_whitespace().next());
            let (card, here): (Vec<&str>, Vec<&str>) =
                listed.partition(|name| ON_A_CARD.contains(name));
            assert_eq!(here, [$($name),*]);
            assert_eq!(card, ON_A_CARD);
        }
    };
}

parts! {
    contract_copies = "contract-copies"
    contract_registration = "contract-registration"
    contract_waiting = "contract-waiting"
    contract_stale_pages = "contract-stale-pages"
    contract_events = "contract-events"
    contract_host_functions = "contract-host-functions"
    contract_contexts = "contract-contexts"
    contract_no_context = "contract-no-context"
    contract_capture = "contract-capture"
    contract_event_captured = "contract-event-captured"
    contract_slow_host_function = "contract-slow-host-function"
    contract_sizes = "contract-sizes"
    contract_memory = "contract-memory"
    contract_queue = "contract-queue"
    contract_order = "contract-order"
    contract_pages = "contract-pages"
    contract_two_devices = "contract-two-devices"
    contract_sticky = "contract-sticky"
    conformance_device = "conformance-device"
    scenario_01_staging_exhaustion = "scenario-01"
    scenario_04_dropped_futures = "scenario-04"
    scenario_06_evict_against_read = "scenario-06"
    scenario_07_eviction_after_a_kernel = "scenario-07"
    scenario_08_reuse_under_a_reader = "scenario-08"
    scenario_09_freed_under_a_kernel = "scenario-09"
    scenario_10_sets_in_opposite_orders = "scenario-10"
    scenario_12_everything_pinned = "scenario-12"
    scenario_18_device_errors = "scenario-18"
    scenario_21_fragmentation = "scenario-21"
    scenario_24_close_among_operations = "scenario-24"
    scenario_31_slabs_given_back = "scenario-31"
    scenario_32_lost_notices = "scenario-32"
    scenario_33_neighbours = "scenario-33"
    scenario_47_written_back = "scenario-47"
    scenario_pages = "scenario-pages"
    scenario_two_devices = "scenario-two-devices"
    bar_g1_the_link = "bar-g1"
    bar_g2_disk_to_device = "bar-g2"
    bar_g3_completion = "bar-g3"
    bar_g4_layers_prefetched = "bar-g4"
    bar_g5_random_access = "bar-g5"
    bar_g6_many_pieces = "bar-g6"
    bar_pages_against_a_block = "bar-pages"
    cost_step_of_2000_leases = "cost-step"
    cost_crossover_of_small_copies = "cost-crossover"
    cost_write_back_of_what_kernels_wrote = "cost-write-back"
}

/// What has passed is not run again; what is half written counts as not run.
#[test]
fn a_run_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    assert!(
        gpu_check(&["--only", "contract-contexts", "contract-events"], &record).status.success()
    );
    assert_eq!(lines(&record).len(), 2);
    let again = gpu_check(&["--only", "contract-contexts"], &record);
    assert!(String::from_utf8(again.stdout).unwrap().contains("passed before"));
    assert_eq!(lines(&record).len(), 2, "and leaves no line");
    let text = std::fs::read_to_string(&record).unwrap();
    let cut = text.lines().next().unwrap();
    std::fs::write(&record, format!("{cut}\n{{\"part\":\"contract-ev")).unwrap();
    let rest = gpu_check(&["--only", "contract-contexts", "contract-events"], &record);
    let rest = String::from_utf8(rest.stdout).unwrap();
    assert_eq!(rest.matches("passed before").count(), 1, "{rest}");
    assert!(rest.contains("1 passed"), "{rest}");
    let text = std::fs::read_to_string(&record).unwrap();
    let whole = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok());
    assert_eq!(whole.count(), 2, "what came behind the cut line is there: {text}");
    let again = gpu_check(&["--again", "--only", "contract-contexts"], &record);
    assert!(String::from_utf8(again.stdout).unwrap().contains("1 passed"));
}

/// What needs a card is skipped without one, and says why.
#[test]
fn parts_for_a_card_are_skipped_aloud() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    let output = gpu_check(&["--only", "sanitizer"], &record);
    assert!(output.status.success());
    let record = lines(&record);
    assert_eq!(record.len(), ON_A_CARD.len());
    for line in record {
        assert_eq!(
            (&line["outcome"], &line["why"]),
            (&"skipped".into(), &"it needs a card".into())
        );
    }
}

/// A part that finds no card says why in the record, not on the screen alone.
#[test]
fn the_record_says_why_there_is_no_card() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    let output = gpu_check(&["--only", "contract-events", "--device", "7"], &record);
    assert!(!output.status.success());
    let record = lines(&record);
    assert_eq!(record[0]["outcome"], "failed");
    let why = record[0]["why"].as_str().unwrap();
    assert!(why.contains("no card") && why.contains("there is no device 7"), "{why}");
}

/// What cannot be asked for is said.
#[test]
fn a_part_that_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record.json");
    let output = gpu_check(&["--only", "no-such-part"], &record);
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("--list"));
    let nowhere = gpu_check(&["--only", "contract-events"], Path::new("/proc/no/such/record"));
    assert!(!nowhere.status.success());
}
