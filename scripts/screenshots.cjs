// Pictures of the latest sweep on MLflow's and Prefect's pages, as a person sees them, for docs/images/.
//
//   npm install --prefix /tmp/screenshots playwright-core      # once; and Chromium: apt-get install chromium
//   samq ui &
//   NODE_PATH=/tmp/screenshots/node_modules node scripts/screenshots.cjs docs/images http://127.0.0.1:5000 http://127.0.0.1:4200
//
// Prefect's address may be left out.

const { mkdtempSync, mkdirSync } = require("node:fs");
const { tmpdir } = require("node:os");
const { join } = require("node:path");
const { chromium } = require("playwright-core");

const AXES = ["plan/threshold", "plan/budget_bytes", "memory/file_bytes", "fidelity/mean_kld_nats", "json/valid_percent", "speed/latency_p99_ms"];
const MODELS = "workflowType=machine_learning";
const [folder, mlflow, prefect] = process.argv.slice(2);

async function ask(url, body) {
  const answer = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

async function main() {
  mkdirSync(folder, { recursive: true });
  const browser = await chromium.launchPersistentContext(mkdtempSync(join(tmpdir(), "screenshots-")), {
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    viewport: { width: 1700, height: 1000 },
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync"],
  });
  const page = browser.pages()[0];
  await page.addInitScript(() => { // no assistant over the page
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
  });

  async function picture(name, url, ready, act = async () => {}) {
    await page.goto("about:blank"); // a change behind the # alone would load nothing
    await page.goto(url);
    await page.getByText(ready).first().waitFor({ timeout: 60_000 });
    await act();
    await page.waitForTimeout(3000); // charts are drawn after the text
    await page.screenshot({ path: join(folder, `${name}.png`) });
    console.log(join(folder, `${name}.png`));
  }

  const { experiments } = await ask(`${mlflow}/api/2.0/mlflow/experiments/search`, { max_results: 100 });
  const search = { experiment_ids: experiments.map((one) => one.experiment_id), order_by: ["attributes.start_time DESC"] };
  const runs = async (filter) => (await ask(`${mlflow}/api/2.0/mlflow/runs/search`, { ...search, filter })).runs;
  const [sweep] = await runs("tags.`samq.best` != ''");
  const { run_id: parent, experiment_id: experiment } = sweep.info;
  const candidates = (await runs(`tags.mlflow.parentRunId = '${parent}'`)).filter((run) => run.info.status === "FINISHED");
  const home = `${mlflow}/#/experiments/${experiment}`;
  const view = `${home}/runs?${MODELS}&viewStateShareKey=samq-latest-sweep`;

  await picture("mlflow-runs", view, "samq-");
  await picture("mlflow-charts", `${view}&compareRunsMode=CHART`, "Parallel Coordinates");
  await picture("mlflow-report", `${home}/runs/${parent}?${MODELS}`, "lowest mean KLD", () => page.getByText("Show more").click());
  for (const figure of ["pareto", "sensitivity", "prediction", "budgets"]) {
    await picture(`mlflow-${figure}`, `${home}/runs/${parent}/artifacts/figures/${figure}.png?${MODELS}`, "Path:");
  }

  const ids = encodeURIComponent(JSON.stringify(candidates.map((run) => run.info.run_id)));
  const compare = `${mlflow}/#/compare-runs?runs=${ids}&experiments=${encodeURIComponent(JSON.stringify([experiment]))}&${MODELS}`;
  await picture("mlflow-compare", compare, "Parallel Coordinates Plot", async () => {
    await page.getByText("Clear All").click();
    await page.getByText("Please select metrics").click({ force: true });
    for (const axis of AXES) {
      await page.keyboard.type(axis);
      await page.keyboard.press("Enter");
    }
    await page.keyboard.press("Escape");
  });

  const registered = sweep.data.tags.find((tag) => tag.key === "samq.registered");
  if (registered) {
    const [, name, version] = registered.value.match(/^(.*) version (\d+)$/);
    await picture("mlflow-model", `${mlflow}/#/models/${encodeURIComponent(name)}/versions/${version}?${MODELS}`, "sha256");
  }
  if (prefect) {
    // The longest of the last completed runs: in one where all was cached there is little to see.
    const completed = { state: { type: { any_: ["COMPLETED"] } } };
    const last = await ask(`${prefect}/api/flow_runs/filter`, { flow_runs: completed, sort: "START_TIME_DESC", limit: 20 });
    const run = last.reduce((longest, one) => (one.total_run_time > longest.total_run_time ? one : longest));
    await picture("prefect-run", `${prefect}/v2/runs/flow-run/${run.id}`, "Task runs");
  }
  await browser.close();
}

main().catch((error) => { console.error(error); process.exit(1); });
