//! The disk suite passes what is right and fails what is broken.

use std::sync::Arc;

use vmem_io::DiskTier;
use vmem_testkit::conformance::disk;
use vmem_testkit::{
    DelayDriver, Fault, FaultDriver, FaultPlan, OpKind, Seed, SimConfig, SimDriver, When,
};

use crate::message_of;
use crate::tiny_disk::{Bug, TinyDisk};

const CAPACITY: u64 = disk::LEAST_CAPACITY;

fn medium(slow: bool) -> Arc<SimDriver> {
    let mut config = SimConfig { len_bytes: CAPACITY, ..SimConfig::default() };
    if slow {
        config.speed.write_latency = std::time::Duration::from_millis(3);
        config.speed.read_latency = std::time::Duration::from_millis(2);
        config.speed.queue_depth = 3;
    }
    SimDriver::new(config)
}

#[test]
fn a_right_tier_passes() {
    Seed::simulate("a_right_tier_passes", |seed| async move {
        for slow in [false, true] {
            let make = async || TinyDisk::new(medium(slow), CAPACITY, Bug::None);
            disk::all(seed, make).await;
        }
    });
}

#[test]
fn the_real_tier_passes_over_a_simulated_disk() {
    Seed::simulate("the_real_tier_passes_over_a_simulated_disk", |seed| async move {
        for slow in [false, true] {
            disk::all(seed, async || DiskTier::new(medium(slow), CAPACITY)).await;
        }
        let delays = std::time::Duration::ZERO..std::time::Duration::from_millis(30);
        let delayed = || DelayDriver::new(medium(true), seed, delays.clone());
        disk::all(seed, async || DiskTier::new(delayed(), CAPACITY)).await;
        let medium = medium(false);
        let tier = DiskTier::new(medium.clone(), CAPACITY);
        let flip = |byte, bit| medium.damage(|image| image.flip_bit(byte, bit));
        disk::sees_every_flip(seed, &*tier, flip).await;
    });
}

#[test]
fn every_flip_is_seen_by_a_right_tier_and_none_by_a_trusting_one() {
    let check = |bug| {
        Seed::simulate("every_flip_is_seen", |seed| async move {
            let medium = medium(false);
            let tier = TinyDisk::new(medium.clone(), CAPACITY, bug);
            let flip = |byte, bit| medium.damage(|image| image.flip_bit(byte, bit));
            disk::sees_every_flip(seed, &*tier, flip).await;
        });
    };
    check(Bug::None);
    let message = message_of(|| check(Bug::TrustsTheDisk));
    assert!(message.contains("was flipped, and the read: Ok"), "{message}");
}

#[test]
fn every_planted_bug_fails() {
    let bugs = [
        (Bug::LeaksDropped, "the space of dropped futures comes back"),
        (Bug::FreesEarly, "Corrupt"),
        (Bug::ShowsOldBytes, "a reserved chunk"),
        (Bug::KeepsHalf, "left == right"),
        (Bug::SaysAllIsOneRun, "do not fit"),
        (Bug::CountsPayload, "used by an extent"),
        (Bug::IgnoresPlaces, "the gap between chunks"),
        (Bug::NeverCloses, "after close"),
        (Bug::SwapsSums, "checksum of a chunk"),
    ];
    for (bug, symptom) in bugs {
        let message = message_of(|| {
            Seed::simulate("a_broken_tier", |seed| async move {
                let make = async || TinyDisk::new(medium(true), CAPACITY, bug);
                disk::all(seed, make).await;
            })
        });
        assert!(message.contains(symptom), "{bug:?}: {message}");
    }
}

#[test]
fn a_lost_write_below_a_tier_fails() {
    let message = message_of(|| {
        Seed::simulate("a_lost_write_below", |seed| async move {
            let faulty = FaultDriver::new(medium(false), seed);
            faulty.set(FaultPlan::new().on(OpKind::Write, When::Nth(4), Fault::LostWrite));
            let tier = TinyDisk::new(faulty, CAPACITY, Bug::None);
            disk::round_trips(seed, &*tier).await;
        })
    });
    assert!(message.contains("Corrupt"), "{message}");
}
