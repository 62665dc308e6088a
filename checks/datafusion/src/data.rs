//! The tables.
//!
//! Invariant: a row is a function of the seed and its number, so that both sides have the same
//! rows. Called by `main.rs`.

use std::fmt::Write;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use datafusion::arrow::array::{Int32Array, Int64Array, RecordBatch, StringArray};
use datafusion::arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::parquet::arrow::AsyncArrowWriter;

use datafusion::parquet::file::properties::WriterProperties;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

/// Orders in each file.
pub(crate) const ROWS_PER_FILE: u64 = 1 << 18;

const ROWS_PER_BATCH: usize = 8192;
const ROWS_PER_GROUP: usize = 1 << 17;
const CUSTOMERS: u64 = 100_000;
const REGIONS: [&str; 6] = ["Africa", "America", "Antarctica", "Asia", "Europe", "Oceania"];
const SEGMENTS: [&str; 4] = ["bakers", "farmers", "schools", "sailors"];

/// A mixed number, the `n`th of a sequence.
fn mix(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Writes a file of orders, whose numbers start with `first`; its length in bytes.
pub(crate) async fn write_orders(
    store: &Arc<dyn ObjectStore>,
    seed: u64,
    file: u64,
    first: u64,
) -> Result<u64> {
    let path = Path::from(format!("orders/{file:04}.parquet"));
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("customer", DataType::Int64, false),
        Field::new("region", DataType::Utf8, false),
        Field::new("quantity", DataType::Int32, false),
        Field::new("cents", DataType::Int64, false),
        Field::new("note", DataType::Utf8, false),
    ]));
    let batch = |rows| orders(&schema, seed, rows);
    write(store, &path, schema.clone(), first..first + ROWS_PER_FILE, batch).await
}

fn orders(schema: &SchemaRef, seed: u64, rows: Range<u64>) -> Result<RecordBatch> {
    let draw = |row: u64, column: u64| mix(seed, row * 8 + column);
    let integers = |column: u64, below: u64| {
        Int64Array::from_iter_values(rows.clone().map(|row| (draw(row, column) % below) as i64))
    };
    let region = |row| REGIONS[(draw(row, 1) % REGIONS.len() as u64) as usize];
    let quantity = |row| (draw(row, 2) % 100) as i32;
    let note = |row| {
        let mut text = String::with_capacity(32);
        let _ = write!(text, "{:016x}{:016x}", draw(row, 4), draw(row, 5));
        text
    };
    let columns = vec![
        Arc::new(Int64Array::from_iter_values(rows.clone().map(|row| row as i64))) as _,
        Arc::new(integers(0, CUSTOMERS)) as _,
        Arc::new(StringArray::from_iter_values(rows.clone().map(region))) as _,
        Arc::new(Int32Array::from_iter_values(rows.clone().map(quantity))) as _,
        Arc::new(integers(3, 1 << 40)) as _,
        Arc::new(StringArray::from_iter_values(rows.clone().map(note))) as _,
    ];
    Ok(RecordBatch::try_new(schema.clone(), columns)?)
}

/// Writes the file of customers; its length in bytes.
pub(crate) async fn write_customers(store: &Arc<dyn ObjectStore>, seed: u64) -> Result<u64> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("segment", DataType::Utf8, false),
        Field::new("credit", DataType::Int32, false),
    ]));
    let batch = |rows: Range<u64>| {
        let segment = |row: u64| SEGMENTS[(mix(!seed, row * 2) % SEGMENTS.len() as u64) as usize];
        let credit = |row: u64| (mix(!seed, row * 2 + 1) % 1000) as i32;
        let columns = vec![
            Arc::new(Int64Array::from_iter_values(rows.clone().map(|row| row as i64))) as _,
            Arc::new(StringArray::from_iter_values(rows.clone().map(segment))) as _,
            Arc::new(Int32Array::from_iter_values(rows.clone().map(credit))) as _,
        ];
        Ok(RecordBatch::try_new(schema.clone(), columns)?)
    };
    let path = Path::from("customers/all.parquet");
    write(store, &path, schema.clone(), 0..CUSTOMERS, batch).await
}

/// Writes a file as a multipart upload; its length in bytes.
async fn write(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    schema: SchemaRef,
    rows: Range<u64>,
    batch: impl Fn(Range<u64>) -> Result<RecordBatch>,
) -> Result<u64> {
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
        .set_dictionary_enabled(false)
        .build();
    let sink = BufWriter::new(store.clone(), path.clone());
    let mut writer = AsyncArrowWriter::try_new(sink, schema, Some(properties))?;
    for start in rows.clone().step_by(ROWS_PER_BATCH) {
        let end = rows.end.min(start + ROWS_PER_BATCH as u64);
        writer.write(&batch(start..end)?).await?;
    }
    writer.close().await?;
    Ok(store.head(path).await?.size)
}
