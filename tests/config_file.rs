//! A configuration from a file.
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::path::Path;
use std::time::Duration;

use vmem::{GpuSelection, IoDriver, PolicyKind, Promotion, VirtualMemoryConfig};

#[test]
fn every_field_is_read() {
    let config: VirtualMemoryConfig = toml::from_str(
        r#"
        disk_path = "/var/lib/service/vmem"
        host_capacity = "512MiB"
        staging_capacity = 67108864
        disk_capacity = "1.5 TiB"
        vram_capacity = "16GB"
        gpu = 1
        io_driver = "tokio-uring"
        watermarks = [0.5, 0.75]
        max_pinned = 0.25
        policy = "s3-fifo"
        promotion = "never"
        catalog_cache = "32MiB"
        wait_timeout = "1m 30s"
        "#,
    )
    .unwrap();
    assert_eq!(config.disk_path(), Some(Path::new("/var/lib/service/vmem")));
    assert_eq!(config.host_capacity(), Some(512 << 20));
    assert_eq!(config.staging_capacity(), Some(64 << 20));
    assert_eq!(config.disk_capacity(), Some(3 << 39));
    assert_eq!(config.vram_capacity(), Some(16_000_000_000));
    assert_eq!(config.gpus(), [GpuSelection::Device(1)]);
    assert_eq!(config.io_driver(), IoDriver::TokioUring);
    assert_eq!(config.watermarks(), (0.5, 0.75));
    assert!((config.max_pinned() - 0.25).abs() < f64::EPSILON);
    assert_eq!(config.policy(), PolicyKind::S3Fifo);
    assert_eq!(config.promotion(), Promotion::Never);
    assert_eq!(config.catalog_cache(), 32 << 20);
    assert_eq!(config.wait_timeout(), Duration::from_secs(90));
}

#[test]
fn what_is_missing_has_its_default() {
    let config: VirtualMemoryConfig = toml::from_str("promotion = 3\ngpu = \"off\"").unwrap();
    let default = VirtualMemoryConfig::default();
    assert_eq!(config.promotion(), Promotion::OnNthRead(3));
    assert_eq!(config.gpus(), [GpuSelection::Off]);
    assert_eq!(config.host_capacity(), None);
    assert_eq!(config.watermarks(), default.watermarks());
    assert_eq!(config.wait_timeout(), default.wait_timeout());
    assert_eq!(config.catalog_cache(), default.catalog_cache());
}

#[test]
fn what_cannot_work_is_refused_with_its_field() {
    for (text, named) in [
        ("host_capcity = \"1GiB\"", "host_capcity"),
        ("host_capacity = \"1 GiBi\"", "host_capacity"),
        ("host_capacity = -1", "host_capacity"),
        ("host_capacity = 5", "host_capacity"),
        ("watermarks = [0.9, 0.5]", "watermarks"),
        ("io_driver = \"fastest\"", "io_driver"),
        ("policy = \"mru\"", "policy"),
        ("promotion = \"always\"", "promotion"),
        ("promotion = 0", "promotion"),
        ("wait_timeout = \"soon\"", "wait_timeout"),
        ("wait_timeout = \"0s\"", "wait_timeout"),
    ] {
        let refused = toml::from_str::<VirtualMemoryConfig>(text).unwrap_err().to_string();
        assert!(refused.contains(named), "{text}: {refused}");
    }
}
