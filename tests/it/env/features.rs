//! What a build without some of the features offers: a typed error that names the feature, and
//! everything else.
//!
//! Invariant: the same tests hold in every build; `.ci/run nightly` runs them in the
//! smallest one.

use vmem::{
    Capabilities, GpuSelection, IoDriver, MemoryTier, VirtualMemoryConfig,
    VirtualMemoryConfigBuilder, VirtualMemoryError,
};

const LEN: usize = 300_000;

fn config() -> VirtualMemoryConfigBuilder {
    VirtualMemoryConfig::builder().host_capacity(4 << 20).disk_capacity(16 << 20)
}

/// Opens, writes, moves to disk, reads, keeps a name, closes; what was found.
async fn works(builder: VirtualMemoryConfigBuilder) -> Result<Capabilities, VirtualMemoryError> {
    let vmem = vmem::open(builder.build()?).await?;
    let bytes: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
    let handle = vmem.put_named("kept", &bytes, MemoryTier::Host).await?;
    vmem.demote(&handle, MemoryTier::Disk).await?;
    assert!(vmem.read(&handle).await? == bytes);
    let found = vmem.capabilities().clone();
    vmem.close().await?;
    Ok(found)
}

/// The tier that is unavailable, and why.
fn unavailable<T: std::fmt::Debug>(outcome: Result<T, VirtualMemoryError>) -> (MemoryTier, String) {
    match outcome {
        Err(VirtualMemoryError::TierNotAvailable { tier, reason }) => (tier, reason.to_string()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn host_and_disk_serve_in_every_build() {
    works(config()).await.unwrap();
    let found = works(config().io_driver(IoDriver::Blocking)).await.unwrap();
    assert_eq!(found.disk_driver, Some(IoDriver::Blocking));
}

#[tokio::test]
async fn auto_takes_a_driver_that_the_build_has() {
    let found = works(config()).await.unwrap();
    let lacks_it = cfg!(not(all(target_os = "linux", feature = "tokio-uring")));
    assert!(!(lacks_it && found.disk_driver == Some(IoDriver::TokioUring)), "{found}");
}

#[tokio::test]
async fn a_driver_that_the_build_lacks_is_unavailable() {
    let outcome = works(config().io_driver(IoDriver::TokioUring)).await;
    if cfg!(all(target_os = "linux", feature = "tokio-uring")) {
        match outcome {
            Ok(found) => assert_eq!(found.disk_driver, Some(IoDriver::TokioUring)),
            denied => println!("SKIPPED tokio-uring: {}", unavailable(denied).1),
        }
        return;
    }
    let (tier, reason) = unavailable(outcome);
    assert_eq!(tier, MemoryTier::Disk);
    let what = if cfg!(target_os = "linux") { "feature `tokio-uring`" } else { "of Linux" };
    assert!(reason.contains(what) && reason.contains("IoDriver::Auto"), "{reason}");
}

#[tokio::test]
async fn a_gpu_that_the_build_cannot_use_is_unavailable() {
    if cfg!(feature = "gpu") {
        return println!("SKIPPED: this build has the feature `gpu`");
    }
    let found = works(config().gpu(GpuSelection::Auto)).await.unwrap();
    assert!(found.vram.is_none() && found.devices.is_empty());
    assert!(
        found.to_string().contains("vram: none: this build lacks the feature `gpu`"),
        "{found}"
    );
    let off = works(config().gpu(GpuSelection::Off)).await.unwrap();
    assert!(off.vram_reason.contains("configuration"), "{off}");

    for asked in [GpuSelection::Device(0), GpuSelection::Uuid("GPU-1".into())] {
        let (tier, reason) = unavailable(works(config().gpu(asked)).await);
        assert!(tier == MemoryTier::Vram && reason.contains("feature `gpu`"), "{tier} {reason}");
    }
    let vmem = vmem::open(config().build().unwrap()).await.unwrap();
    let (tier, reason) = unavailable(vmem.allocate(LEN, MemoryTier::Vram).await);
    assert!(tier == MemoryTier::Vram && reason.contains("feature `gpu`"), "{tier} {reason}");
    vmem.close().await.unwrap();
}

#[test]
fn a_closed_store_is_verified_through_the_facade() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(works(config().disk_path(directory.path()))).unwrap();
    let verified = vmem::verify(directory.path()).unwrap();
    assert_eq!((verified.objects, verified.bytes), (1, LEN as u64));
    assert!(verified.damaged.is_empty());
}
