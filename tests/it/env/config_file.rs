//! A configuration from a file.

use std::path::Path;
use std::time::Duration;

use vmem::policy::Lru;
use vmem::{
    Budget, GpuSelection, IoDriver, PolicyChoice, PolicyKind, Promotion, SwitchPoints,
    VirtualMemoryConfig, VirtualMemoryConfigBuilder, VirtualMemoryError, WriteBack,
};

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
        vram_policy = "sieve"
        promotion = "never"
        gather_promotion = 3
        write_back = "1m 30s"
        switch_points = { small_max = 65536, batch_min = 3 }
        catalog_cache = "32MiB"
        wait_timeout = "1m 30s"
        slow_read_threshold = "250ms"
        spans_per_second = 50
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
    assert_eq!(config.vram_policy(), PolicyKind::Sieve);
    assert_eq!(config.promotion(), Promotion::Never);
    assert_eq!(config.gather_promotion(), Promotion::OnNthGather(3));
    assert_eq!(config.write_back(), WriteBack::After(Duration::from_secs(90)));
    let points = SwitchPoints { small_max: 64 << 10, small_min: 4, batch_min: 3 };
    assert_eq!(config.switch_points(), points);
    assert_eq!(config.catalog_cache(), 32 << 20);
    assert_eq!(config.wait_timeout(), Duration::from_secs(90));
    assert_eq!(config.slow_read_threshold(), Duration::from_millis(250));
    assert_eq!(config.spans_per_second(), 50);
}

#[test]
fn missing_field_has_its_default() {
    let config: VirtualMemoryConfig = toml::from_str("promotion = 3\ngpu = \"off\"").unwrap();
    let default = VirtualMemoryConfig::default();
    assert_eq!(config.promotion(), Promotion::OnNthRead(3));
    assert_eq!(config.gather_promotion(), Promotion::Never);
    assert_eq!(config.gpus(), [GpuSelection::Off]);
    assert_eq!(config.host_capacity(), None);
    assert_eq!(config.watermarks(), default.watermarks());
    assert_eq!(config.wait_timeout(), default.wait_timeout());
    assert_eq!(config.catalog_cache(), default.catalog_cache());
}

#[test]
fn unworkable_value_is_refused_with_its_field() {
    for (text, named) in [
        ("host_capcity = \"1GiB\"", "host_capcity"),
        ("host_capacity = \"1 GiBi\"", "host_capacity"),
        ("host_capacity = -1", "host_capacity"),
        ("host_capacity = 5", "host_capacity"),
        ("watermarks = [0.9, 0.5]", "watermarks"),
        ("io_driver = \"fastest\"", "io_driver"),
        ("switch_points = { small_max = 2000000 }", "small_max at most 1048576"),
        ("switch_points = { small_min = 0 }", "switch_points"),
        ("switch_points = { largest = 1 }", "largest"),
        ("policy = \"mru\"", "policy"),
        ("vram_policy = \"mru\"", "mru"),
        ("write_back = \"lazy\"", "write_back"),
        ("promotion = \"always\"", "promotion"),
        ("promotion = 0", "promotion"),
        ("promotion = \"gather:0\"", "promotion"),
        ("gather_promotion = -1", "gather_promotion"),
        ("wait_timeout = \"soon\"", "wait_timeout"),
        ("wait_timeout = \"0s\"", "wait_timeout"),
        ("slow_read_threshold = 1", "slow_read_threshold"),
        ("spans_per_second = -1", "spans_per_second"),
        ("host_capacity = \"0%\"", "host_capacity"),
        ("host_capacity = \"100.5%\"", "host_capacity"),
        ("disk_capacity = \"-1%\"", "disk_capacity"),
        ("disk_capacity = \"NaN%\"", "disk_capacity"),
        ("vram_capacity = \"inf%\"", "vram_capacity"),
        ("vram_capacity = \"%\"", "vram_capacity"),
        ("staging_capacity = \"25%\"", "staging_capacity"),
        ("catalog_cache = \"25%\"", "catalog_cache"),
        ("gpu = 0\ngpus = [1]", "gpus"),
        ("gpus = [0, 1]\nvram_capacities = [5, 0]", "vram_capacities"),
        ("gpus = [0, 1]\nvram_capacities = [5]", "1 for 2 GPUs"),
        ("vram_capacities = []", "0 for 1 GPUs"),
        ("gpus = [0, 1]\nvram_policies = [\"lru\", \"mru\"]", "mru"),
        ("gpus = [0, 1]\nvram_policies = [\"lru\"]", "1 for 2 GPUs"),
        ("vram_policy = \"lru\"\nvram_policies = [\"lru\"]", "vram_policies"),
        ("gpus = [0, 1]\nvram_capacity = 5\nvram_capacities = [5, 5]", "vram_capacities"),
    ] {
        let refused = toml::from_str::<VirtualMemoryConfig>(text).unwrap_err().to_string();
        assert!(refused.contains(named), "{text}: {refused}");
    }
}

#[test]
fn memory_of_each_device_is_read_and_written() {
    let text = "gpus = [0, 1]\nvram_capacities = [\"1 GiB\", \"25%\"]\n\
                vram_policies = [\"sieve\", \"lru\"]";
    let config: VirtualMemoryConfig = toml::from_str(text).unwrap();
    let written = toml::to_string(&config).unwrap();
    for config in [config, toml::from_str(&written).unwrap()] {
        let budgets = [0, 1].map(|device| config.vram_budget_of(device));
        assert_eq!(budgets, [Budget::Bytes(1 << 30), Budget::Percent(25.0)]);
        let policies = [0, 1].map(|device| config.vram_policy_of(device));
        assert_eq!(policies, [PolicyKind::Sieve, PolicyKind::Lru]);
        assert_eq!(config.vram_capacity(), None, "they have no one number");
    }
    let one = VirtualMemoryConfig::builder().vram_capacities([5]).vram_capacity(7).build();
    assert_eq!(one.unwrap().vram_budget_of(0), Budget::Bytes(7), "the last call counts");
}

#[test]
fn sizes_in_percent_are_read_and_checked() {
    let text = "host_capacity = \"25%\"\ndisk_capacity = \" 12.5 % \"\nvram_capacity = \"100%\"";
    let config: VirtualMemoryConfig = toml::from_str(text).unwrap();
    assert_eq!(config.host_budget(), Budget::Percent(25.0));
    assert_eq!(config.disk_budget(), Budget::Percent(12.5));
    assert_eq!(config.vram_budget(), Budget::Percent(100.0));
    assert_eq!(config.host_capacity(), None, "unknown until it is opened");

    type Set = fn(VirtualMemoryConfigBuilder, f64) -> VirtualMemoryConfigBuilder;
    let setters: [(&str, Set); 3] = [
        ("host_capacity", |builder, percent| builder.host_percent(percent)),
        ("disk_capacity", |builder, percent| builder.disk_percent(percent)),
        ("vram_capacity", |builder, percent| builder.vram_percent(percent)),
    ];
    for (named, set) in setters {
        for percent in [0.0, -1.0, 100.1, f64::NAN, f64::INFINITY] {
            let refused = set(VirtualMemoryConfig::builder(), percent).build().unwrap_err();
            assert_eq!(field(&refused), named, "{percent}: {refused}");
        }
        set(VirtualMemoryConfig::builder(), 0.5).build().unwrap();
    }
    let unknown = Budget::Percent(25.0).resolve("host_capacity", 0, || 1).unwrap_err();
    assert_eq!(field(&unknown), "host_capacity", "{unknown}");
}

/// Which field the error names.
fn field(error: &VirtualMemoryError) -> &'static str {
    match error {
        VirtualMemoryError::InvalidConfig { field, .. } => field,
        other => panic!("{other:?}"),
    }
}

/// Environment variables are words, whatever they stand for.
#[test]
fn numbers_are_read_as_words_too() {
    let words = r#"{
        "gpu": "1", "promotion": "3", "gather_promotion": "2", "host_capacity": "1048576",
        "policy": "s3fifo"
    }"#;
    let config: VirtualMemoryConfig = serde_json::from_str(words).unwrap();
    assert_eq!(config.gpus(), [GpuSelection::Device(1)]);
    assert_eq!(config.promotion(), Promotion::OnNthRead(3));
    assert_eq!(config.gather_promotion(), Promotion::OnNthGather(2));
    assert_eq!(config.host_capacity(), Some(1 << 20));
    assert_eq!(config.policy(), PolicyKind::S3Fifo);
}

/// Written and read again, in two formats, of which one has no `null`.
fn there_and_back(config: &VirtualMemoryConfig) {
    let shown = format!("{config:?}");
    let text = toml::to_string(config).unwrap();
    let again: VirtualMemoryConfig = toml::from_str(&text).unwrap();
    assert_eq!(format!("{again:?}"), shown, "{text}");
    let text = serde_json::to_string(config).unwrap();
    let again: VirtualMemoryConfig = serde_json::from_str(&text).unwrap();
    assert_eq!(format!("{again:?}"), shown, "{text}");
}

#[test]
fn written_configuration_is_read_as_the_same() {
    let builder = VirtualMemoryConfig::builder;
    there_and_back(&VirtualMemoryConfig::default());
    let set = builder()
        .disk_path("/var/lib/service/\u{e4} b\"c")
        .allow_foreign_files(true)
        .host_capacity(i64::MAX as u64)
        .staging_capacity(1 << 20)
        .disk_percent(100.0 / 3.0)
        .vram_percent(1e-7)
        .gpus([GpuSelection::Device(2), GpuSelection::Uuid("GPU-0-0".into())])
        .watermarks(0.1, 1.0 - f64::EPSILON)
        .max_pinned(1.0 / 7.0)
        .catalog_cache(65_537)
        .wait_timeout(Duration::new(400 * 86_400 + 3_661, 1_000_007))
        .slow_read_threshold(Duration::MAX);
    there_and_back(&set.build().unwrap());
    for gpu in ["auto", "off", "0", "GPU-6d0f3c9e-0000-4000-8000-000000000000"] {
        there_and_back(&builder().gpu(gpu.parse().unwrap()).build().unwrap());
    }
    for driver in ["auto", "reactor", "tokio-uring", "blocking"] {
        there_and_back(&builder().io_driver(driver.parse().unwrap()).build().unwrap());
    }
    for policy in ["lru", "sieve", "s3-fifo", "s3fifo"] {
        let kind: PolicyKind = policy.parse().unwrap();
        there_and_back(&builder().policy(kind).build().unwrap());
        there_and_back(&builder().vram_policy(kind).build().unwrap());
    }
    let after = [Duration::ZERO, Duration::from_millis(250), Duration::MAX].map(WriteBack::After);
    for write_back in [WriteBack::Eager, WriteBack::OnEvict].into_iter().chain(after) {
        there_and_back(&builder().write_back(write_back).build().unwrap());
    }
    for promotion in ["1", "4294967295", "never"] {
        there_and_back(&builder().promotion(promotion.parse().unwrap()).build().unwrap());
    }
    for gathers in [Promotion::Never, Promotion::OnNthGather(1), Promotion::OnNthGather(u32::MAX)] {
        there_and_back(&builder().gather_promotion(gathers).build().unwrap());
    }
}

/// A rule for gathers is one beside that for reads, however it is given.
#[test]
fn reads_and_gathers_have_a_rule_each() {
    let both = |config: &VirtualMemoryConfig| (config.promotion(), config.gather_promotion());
    let builder = VirtualMemoryConfig::builder;
    let set = builder().promotion(Promotion::OnNthRead(3)).promotion(Promotion::OnNthGather(2));
    let expected = (Promotion::OnNthRead(3), Promotion::OnNthGather(2));
    assert_eq!(both(&set.build().unwrap()), expected);
    let set = builder().promotion(Promotion::OnNthGather(2)).promotion(Promotion::Never);
    assert_eq!(both(&set.build().unwrap()), (Promotion::Never, Promotion::OnNthGather(2)));
    for text in ["promotion = \"gather:4\"", "gather_promotion = 4"] {
        let config: VirtualMemoryConfig = toml::from_str(text).unwrap();
        assert_eq!(both(&config), (Promotion::default(), Promotion::OnNthGather(4)), "{text}");
    }
    for wrong in [Promotion::OnNthGather(0), Promotion::OnNthRead(2)] {
        let refused = builder().gather_promotion(wrong).build().unwrap_err();
        assert_eq!(field(&refused), "gather_promotion", "{refused}");
    }
}

#[test]
fn value_that_no_file_can_say_is_an_error() {
    let own = PolicyChoice::custom("lru", || Box::<Lru>::default());
    let policy = VirtualMemoryConfig::builder().policy(own.clone()).build().unwrap();
    assert!(serde_json::to_string(&policy).unwrap_err().to_string().contains("policy"));
    let policy = VirtualMemoryConfig::builder().vram_policy(own).build().unwrap();
    assert!(serde_json::to_string(&policy).unwrap_err().to_string().contains("policy"));
    for uuid in ["off", "3", "nonsense"] {
        let gpu = GpuSelection::Uuid(uuid.into());
        let config = VirtualMemoryConfig::builder().gpu(gpu).build().unwrap();
        assert!(serde_json::to_string(&config).unwrap_err().to_string().contains(uuid));
    }
}

/// The budgets that a store came to, by which the next one opens the same way.
#[tokio::test]
async fn a_store_tells_its_effective_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let asked = VirtualMemoryConfig::builder()
        .host_percent(0.5)
        .disk_percent(1.0)
        .disk_path(directory.path())
        .gpu(GpuSelection::Off)
        .policy(PolicyKind::Sieve);
    let vmem = vmem::open(asked.build().unwrap()).await.unwrap();
    let config = vmem.config().clone();
    let stats = vmem.stats();
    let host = config.host_capacity().unwrap();
    assert!(host.abs_diff(vmem_io::memory_limit_bytes() / 200) <= 1, "half a percent, not {host}");
    // But for what is rounded down to whole pages.
    let used = stats.host.capacity_bytes + stats.staging_bytes;
    assert!(used <= host && host - used < 64 << 10, "{used} of {host}");
    assert_eq!(config.staging_capacity(), Some(stats.staging_bytes));
    assert_eq!(config.disk_capacity(), Some(stats.disk.capacity_bytes));
    assert_eq!(Some(config.io_driver()), vmem.capabilities().disk_driver);
    assert_eq!(config.policy(), PolicyKind::Sieve);
    assert_eq!(config.disk_path(), Some(directory.path()));
    vmem.close().await.unwrap();

    there_and_back(&config);
    let again = vmem::open(config.clone()).await.unwrap();
    assert_eq!(format!("{:?}", again.config()), format!("{config:?}"));
    again.close().await.unwrap();
}

#[tokio::test]
async fn a_percentage_that_comes_to_too_little_is_refused() {
    let tiny = VirtualMemoryConfig::builder().host_percent(1e-9).build().unwrap();
    let refused = vmem::open(tiny).await.unwrap_err();
    assert_eq!(field(&refused), "host_capacity", "{refused}");
    let tiny = VirtualMemoryConfig::builder().host_capacity(4 << 20).disk_percent(1e-12);
    let refused = vmem::open(tiny.build().unwrap()).await.unwrap_err();
    assert_eq!(field(&refused), "disk_capacity", "{refused}");
}
