//! What is asked.
//!
//! Invariant: each query has one answer, in one order, whatever the order of execution: sums are of
//! integers, and the last column to sort by is unique. Called by `main.rs`.

use anyhow::Result;
use datafusion::arrow::array::RecordBatch;
use datafusion::arrow::compute::concat_batches;
use datafusion::prelude::SessionContext;

/// Names and queries, over `rows` orders. `{url}` stands for where the tables are.
pub(crate) fn all(rows: u64) -> Vec<(&'static str, String)> {
    let aggregate = "SELECT region, quantity % 10 AS digit, count(*) AS orders, sum(cents) AS sum, \
                     min(cents) AS least, max(cents) AS most, avg(quantity) AS mean, \
                     max(note) AS note \
                     FROM orders GROUP BY region, quantity % 10 ORDER BY region, digit";
    let filter = "SELECT id, cents, note FROM orders \
                  WHERE cents % 97 = 5 AND quantity > 90 ORDER BY id";
    let join = "SELECT c.segment, count(*) AS orders, sum(o.cents) AS sum, max(o.note) AS note \
                FROM orders o JOIN customers c ON o.customer = c.id \
                WHERE c.credit > 500 GROUP BY c.segment ORDER BY c.segment";
    let middle = rows / 2;
    let narrow = format!(
        "SELECT * FROM orders WHERE id BETWEEN {} AND {} ORDER BY id",
        middle - 2000,
        middle + 2000
    );
    // What DataFusion writes, it reads again.
    let copy = "COPY (SELECT id, customer, note FROM orders WHERE quantity = 7) \
                TO '{url}copied/' STORED AS PARQUET";
    let copied = "CREATE EXTERNAL TABLE copied STORED AS PARQUET LOCATION '{url}copied/'";
    let read = "SELECT id, customer, note FROM copied ORDER BY id";
    let drop = "DROP TABLE copied";
    vec![
        ("aggregate", aggregate.to_owned()),
        ("filter", filter.to_owned()),
        ("join", join.to_owned()),
        ("narrow", narrow),
        ("copy", [copy, copied, read, drop].join(";")),
    ]
}

/// The answers of the queries of `sql` that have rows, in one batch; the last one, if several have.
pub(crate) async fn run(context: &SessionContext, sql: &str) -> Result<RecordBatch> {
    let mut answer = None;
    for sql in sql.split(';') {
        let frame = context.sql(sql).await?;
        let schema = frame.schema().inner().clone();
        let batches = frame.collect().await?;
        if sql.starts_with("SELECT") {
            answer = Some(concat_batches(&schema, &batches)?);
        }
    }
    answer.ok_or_else(|| anyhow::anyhow!("{sql} asks nothing"))
}
