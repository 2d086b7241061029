import shutil,sys,time
from playwright.sync_api import sync_playwright
with sync_playwright() as p:
    b=p.chromium.launch(executable_path=shutil.which('chromium'),args=['--no-sandbox'])
    pg=b.new_page(viewport=dict(width=1400,height=1000))
    pg.on('console',lambda m:print('C',m.text[:200])); pg.on('response',lambda r: r.status>=400 and print(r.status,r.url))
    pg.goto(f'http://127.0.0.1:{sys.argv[1]}/doc/tree/page.ipynb')
    pg.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook .cm-content')")
    time.sleep(3)
    pg.screenshot(path='/tmp/src_d/lab.png')
    print(pg.evaluate("jupyterapp.commands.listCommands().filter(c=>c.includes('run-all'))"))
    print(pg.evaluate("jupyterapp.commands.isEnabled('notebook:run-all-cells')"))
    b.close()
